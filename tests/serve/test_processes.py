"""Several gateway processes behind one port: one is killed, metrics are put together, the end is in order."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bitladder.errors import UsageError
from bitladder.serve.limits import add_key
from bitladder.serve.processes import merged
from bitladder.serve.settings import ServeSettings, TierSpec
from cloud_server import serving
from serving_process import ask, own_environment, program_in, run_cli, started


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gateway_pid(log: Path) -> int:
    """The process whose errors go to this file: the parent."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "fd" / "2").resolve() == log and children(int(folder.name)):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("no such process")


def test_processes_share_the_port_the_keys_and_what_they_counted(tmp_path):
    environment = own_environment(tmp_path / "data")
    secret = add_key(tmp_path / "keys", "alice")
    program = str(program_in(tmp_path / "bin"))
    with serving(lambda _: "yes") as upstream:
        url = f"{upstream.url}#m"
        command = [program, "serve", "--quality", url, "--port", "0", "--processes", "3", "--api-key-file", "keys"]
        log = tmp_path / "log"
        with started(command, tmp_path, environment, log) as gateway:
            parent = gateway_pid(log)
            mine = children(parent)
            assert len(mine) == 3
            assert {ask(gateway, key=secret).status_code for _ in range(24)} == {200}
            assert ask(gateway).status_code == 401
            os.kill(mine[1], signal.SIGKILL)
            for _ in range(100):
                assert ask(gateway, key=secret).status_code == 200
                if len(set(children(parent)) - {mine[1]}) == 3:
                    break
                time.sleep(0.05)
            assert len(children(parent)) == 3
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:  # until the one that was started again tells what it counted, too
                text = httpx.get(f"{gateway}/metrics", headers={"authorization": f"Bearer {secret}"}).text
                if len(set(re.findall(r'process="(\d)"', text))) == 3:
                    break
                time.sleep(0.05)
            assert set(re.findall(r'bitladder_up\{process="(\d)",tier="quality"\} 1.0', text)) == {"0", "1", "2"}
            counted = re.findall(r"bitladder_requests_total\{.*outcome=\"complete\".*\} ([\d.]+)", text)
            assert sum(map(float, counted)) >= 8  # at least those of the processes that nobody killed
            assert text.count("# TYPE bitladder_requests_total counter") == 1
    assert log.read_text().count("Serving ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_that_do_not_serve_yet_end_in_good_order(tmp_path, number):
    environment = own_environment(tmp_path / "data")
    with serving(lambda _: "yes") as upstream:
        command = [str(program_in(tmp_path / "bin")), "serve", f"{upstream.url}#m", "--port", "0", "--processes", "6"]
        with started(command, tmp_path, environment, log := tmp_path / "log", end=number):
            pass  # the first one serves; others are still starting. At the end the exit code must be 0
    assert "good order" not in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_request_to_end_is_one_though_the_whole_group_hears_it(tmp_path, number):
    """As a terminal's Ctrl-C does, and a service manager."""
    environment = own_environment(tmp_path / "data")

    def slowly(_):
        time.sleep(2)
        return "all of it"

    with serving(slowly) as upstream:
        command = [str(program_in(tmp_path / "bin")), "serve", f"{upstream.url}#m", "--port", "0", "--processes", "2"]
        with (
            started(command, tmp_path, environment, log := tmp_path / "log", own_group=True) as gateway,
            ThreadPoolExecutor(8) as pool,
        ):
            parent = gateway_pid(log)
            answers = [pool.submit(ask, gateway) for _ in range(8)]
            deadline = time.monotonic() + 60
            while len(upstream.asked) < 8 and time.monotonic() < deadline:
                time.sleep(0.02)
            for pid in (*children(parent), parent) if number == signal.SIGTERM else ():
                os.kill(pid, number)
            os.killpg(parent, number)
            said = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
    assert said == ["all of it"] * 8


_ASKED_AGAIN_AND_AGAIN = """
import signal, uvicorn, uvloop
from bitladder.serve.app import _Server

server = _Server(uvicorn.Config(lambda: None), one_of_many=True)

async def main():
    print("ready", flush=True)
    for _ in range(3000):
        with server.capture_signals():
            pass

signal.signal(signal.SIGTERM, signal.SIG_IGN)
uvloop.run(main())
"""


def test_a_request_to_end_at_any_moment_of_the_end_kills_no_process():
    with subprocess.Popen([sys.executable, "-c", _ASKED_AGAIN_AND_AGAIN], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        while child.poll() is None:
            child.send_signal(signal.SIGTERM)
    assert child.returncode == 0


def test_no_process_outlives_the_one_that_started_them(tmp_path):
    environment = own_environment(tmp_path / "data")
    with serving(lambda _: "yes") as upstream:
        command = [str(program_in(tmp_path / "bin")), "serve", f"{upstream.url}#m", "--port", "0", "--processes", "2"]
        with pytest.raises(AssertionError), started(command, tmp_path, environment, log := tmp_path / "log"):
            parent = gateway_pid(log)
            mine = children(parent)
            os.kill(parent, signal.SIGKILL)
            deadline = time.monotonic() + 30
            while any(Path(f"/proc/{pid}/fd").exists() for pid in mine):
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_what_the_first_process_refuses_is_told_once(tmp_path):
    environment = own_environment(tmp_path / "data")
    with serving(lambda _: "yes") as upstream:
        done = run_cli(
            "serve", "--quality", f"{upstream.url}#nobody", "--port", 0, "--processes", 3,
            folder=tmp_path, environment=environment,
        )  # fmt: skip
    assert done.returncode == 8
    assert done.stderr.count("and not 'nobody'") == 1, done.stderr


def test_a_file_is_served_by_one_process():
    with pytest.raises(UsageError, match="cannot share the engine"):
        ServeSettings(TierSpec("q4", path=Path("q4.gguf")), processes=2)


def test_texts_of_two_processes_become_one():
    text = b'# HELP a_total x\n# TYPE a_total counter\na_total{tier="q"} 2.0\n# HELP b y\n# TYPE b gauge\nb 1.0\n'
    lines = merged({0: text, 2: text}).decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'a_total{process="0",tier="q"} 2.0', 'a_total{process="2",tier="q"} 2.0',
        'b{process="0"} 1.0', 'b{process="2"} 1.0',
    ]  # fmt: skip
