"""Engines of our own: one contract, from a model on the disk to measured answers and to a gateway that serves."""

import asyncio
import json
import math
import os
import sys
from dataclasses import dataclass
from importlib import metadata

import httpx
import psutil
import pytest

from bitladder.describe.criteria import KINDS
from bitladder.describe.workload import Criterion, Input, Workload, questions_of
from bitladder.engines import registry
from bitladder.engines.base import Chat, Identity, Launch, Running
from bitladder.engines.llama import LlamaServer
from bitladder.engines.names import same_model
from bitladder.engines.process import EngineProcess, with_engine_variables
from bitladder.engines.registry import engine_for, start
from bitladder.engines.served import ServedEngine
from bitladder.engines.vllm import Vllm
from bitladder.errors import BadInput, EngineError, EngineGone
from bitladder.files.probe import cpu_name
from bitladder.levels import Container
from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.serve.supervisor import EngineFingerprint
from bitladder.stages.job import Work
from bitladder.stages.measure import answers
from bitladder.stages.run_facts import engine_facts, slots
from bitladder.stages.speeds import measure_in_turns
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded, Subject
from upstreams import CHAT, chat

TOY = """
import http.server, json, os, sys
model, port, length = sys.argv[1], int(sys.argv[2]), sys.argv[3]
print("loading", model, length, flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(200, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers.get("authorization", "") != os.environ.get("TOY_KEY", ""):
            return self.answer(401, {"error": "no key"})
        if "explode" in body["messages"][-1]["content"]:
            print("CUDA error: out of memory" if "memory" in body["messages"][-1]["content"] else "assertion failed",
                  file=sys.stderr, flush=True)
            os.abort()
        said = {"role": "assistant", "content": "A"}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        self.answer(200, {"model": model, "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    def answer(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@dataclass(frozen=True)
class Toy:
    """All that an engine is: who it is, and its server's command."""

    script: str
    name = "toy"

    def missing(self):
        return ""

    def identity(self):
        return Identity("toy", "7")

    def prepare(self, launch):
        return ToyServer(launch, self.identity(), self.script)


class ToyServer(ServedEngine):
    def __init__(self, launch, identity, script):
        super().__init__(launch, identity)
        self.script = script

    def command(self, port):
        return [sys.executable, self.script, self.name, str(port), str(self.launch.n_ctx)]

    def environment(self):
        return {"TOY_KEY": f"Bearer {self.launch.api_key}" if self.launch.api_key else ""}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint folder, and an engine for such, registered."""
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    monkeypatch.setitem(registry.ENGINES, Container.FOLDER, (Toy(str(script)),))
    path = tmp_path / "model-GPTQ-4bit-g128"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def workload(*questions: str) -> Workload:
    criterion = (Criterion("exact", KINDS["exact"].parse("A")),)
    return Workload("w", tuple(Input(text, ({"role": "user", "content": text},), criterion) for text in questions))


def test_an_engine_that_is_its_file_and_its_registration_measures_a_workload(folder):
    asked = workload("a", "b")
    subject = Subject("source", "GPTQ-4bit-g128", made="x")
    with Evidence.open() as store:
        recorded = Recorded(store)
        found, _, stored = answers(subject, folder, asked, recorded, n_ctx=512, work=Work(threads=1))
        assert [answer.text for answer in found] == ["A", "A"] and not stored
        (speed,) = measure_in_turns([folder], Work(threads=1))
        assert speed.load_seconds > 0 and speed.others_share >= 0  # it runs here, whoever keeps its clock
        room, parallel = slots(asked, 512)
        facts = engine_facts(n_ctx=room, n_parallel=parallel, threads=1, container=Container.FOLDER)
        assert (facts["engine"], facts["version"]) == ("toy", "7")
        assert set(recorded.answers(subject, questions_of(asked), facts)) == set(questions_of(asked))


@pytest.mark.parametrize(("unused", "threads"), [(math.inf, 3), (7.6, 3), (1.7, 2), (1.2, 1), (0.1, 1)])
def test_beside_other_programs_an_engine_has_the_cores_that_they_leave(folder, monkeypatch, unused, threads):
    launches = []

    def started(launch: Launch):
        launches.append(launch.threads)
        return start(launch)

    monkeypatch.setattr("bitladder.files.probe.unused_cores", lambda: unused)
    monkeypatch.setattr("bitladder.engines.registry.start", started)
    asked, subject, work = workload("a"), Subject("source", "GPTQ-4bit-g128", made="x"), Work(threads=3)
    with Evidence.open() as store:
        answers(subject, folder, asked, Recorded(store), n_ctx=512, work=work)
        assert answers(subject, folder, asked, Recorded(store), n_ctx=512, work=work).stored
    assert launches == [threads]


def test_it_serves_too_and_is_asked_by_its_gateway_alone(folder):
    tier = TierSpec("GPTQ-4bit-g128", path=folder, sha256="a" * 64)

    async def run() -> None:
        async with deployed(ServeSettings(tier, threads=1)) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                reply = await client.post(CHAT, json=chat("quality"))
                assert reply.json()["choices"][0]["message"]["content"] == "A"
                assert (await client.get("/bitladder/api/live")).json()["tiers"][0]["engine"] == "toy 7"
            address = deployment.tiers[0].engine.address()
            async with httpx.AsyncClient(trust_env=False) as stranger:
                assert (await stranger.post(address + CHAT, json=chat("x"))).status_code == 401

    asyncio.run(run())


def test_what_an_engine_of_our_own_is(folder):
    with start(Launch(folder, n_ctx=64, alias="m")) as engine:
        assert isinstance(engine, Running)
        assert (engine.poll(), engine.name, engine.identity) == (None, "m", Identity("toy", "7", "m"))
        assert "loading m 64" in engine.last_log()
        with pytest.raises(EngineError, match="toy does not give the tokens"):
            engine.tokenize("text")
    assert engine.poll() is not None


@pytest.mark.parametrize(("words", "advice"), [("explode", "inspect"), ("explode, memory", "smaller context")])
def test_its_crash_is_an_error_that_advises_a_smaller_context_where_memory_is_the_cause(folder, words, advice):
    with start(Launch(folder)) as engine, pytest.raises(EngineGone, match="was ended by SIGABRT") as gone:
        engine.chat(Chat.of(words, 1))
    assert advice in gone.value.do and ("smaller" in gone.value.do) == ("memory" in words)


def test_a_terminals_ctrl_c_does_not_reach_it(folder):
    """A terminal sends it to its whole group, and answers that run may still finish."""
    with start(Launch(folder)) as engine:
        keeper = psutil.Process(engine.pid)
        groups = {os.getpgid(process.pid) for process in (keeper, *keeper.children())}
    assert groups == {keeper.pid}


@pytest.mark.parametrize("words", ["[New LWP 77]", "", "7", "{}", '{"address": 1}', "[" * 5000, "x" * 200_000])
@pytest.mark.parametrize("ending", ["os.abort()", "sys.exit(3)"])
def test_what_a_dying_engine_prints_is_no_address(tmp_path, monkeypatch, words, ending):
    """GGML_ABORT has a debugger print a backtrace on stdout before the process ends."""
    (tmp_path / "dying.py").write_text(f"import os, sys\nprint({words!r}, flush=True)\n{ending}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = EngineProcess(Launch("m.gguf"))
    with pytest.raises(EngineGone, match=r"The engine for 'm' (was ended by SIGABRT|ended with exit code 3)") as gone:
        process.start(["dying"], {}, timeout_s=30)
    assert words[:50] in gone.value.means
    assert "smaller" not in gone.value.do
    process.stop()


def test_what_llama_cpp_answered_before_is_still_found():
    """The key of stored evidence, letter by letter."""
    facts = engine_facts(n_ctx=512, n_parallel=2, threads=3)
    version = metadata.version("xllamacpp")
    before = {
        "engine": "xllamacpp", "version": version, "n_ctx": 512, "n_parallel": 2, "threads": 3, "cpu": cpu_name(),
    }  # fmt: skip
    assert json.dumps(facts) == json.dumps(before)


def test_a_folder_without_an_engine_for_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EngineError, match=r"No engine here runs a checkpoint folder: vllm, mlx-lm are not installed"
    ) as refused:
        start(Launch(tmp_path))
    assert "Install vLLM" in refused.value.do
    assert isinstance(engine_for(Container.FILE).prepare(Launch("x.gguf")), LlamaServer)
    with pytest.raises(BadInput, match=r"There is no file 'x\.gguf'"):
        start(Launch("x.gguf"))


def test_vllm_is_asked_for_its_version_and_given_what_was_planned(tmp_path, monkeypatch):
    """A script in its place: what it is told, on the command line and beside it."""
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "if sys.argv[1:] == ['--version']:\n"
        "    print('INFO 01-31 hello'); print('0.25.1'); sys.exit()\n"
        "given = [sys.argv[1:], os.environ['VLLM_API_KEY'], os.environ['OMP_NUM_THREADS']]\n"
        "print(json.dumps(given), file=sys.stderr)\n"
        "sys.exit(2)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(Vllm().identity()) == "vllm 0.25.1"
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(EngineGone) as gone:
        start(Launch(folder, n_ctx=512, n_parallel=3, threads=2, api_key="secret", port=9))
    words, key, threads = json.loads(gone.value.means.splitlines()[-1])
    assert (words[:2], key, threads) == (["serve", str(folder)], "secret", "2")
    told = dict(zip(words[2::2], words[3::2], strict=True))
    assert told == {
        "--served-model-name": "m", "--host": "127.0.0.1", "--port": "9", "--max-model-len": "512",
        "--max-num-seqs": "3", "--generation-config": "vllm",
    }  # fmt: skip


def test_what_an_engine_started_ends_with_it(folder, tmp_path, monkeypatch):
    """Engines that compute in processes of their own leave them behind when they are killed."""
    import psutil

    script = tmp_path / "parent.py"
    script.write_text(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n{TOY}"
    )
    monkeypatch.setitem(registry.ENGINES, Container.FOLDER, (Toy(str(script)),))
    with start(Launch(folder)) as engine:
        (server,) = psutil.Process(engine.pid).children()
        (helper,) = server.children()
    assert psutil.wait_procs([server, helper], timeout=10)[1] == []


def test_a_file_changed_in_a_served_folder_is_noticed(folder):
    fingerprint = EngineFingerprint(folder)
    fingerprint.check()
    (folder / "config.json").write_text('{"other": true}')
    with pytest.raises(EngineError, match="or another time"):
        fingerprint.check()


@pytest.mark.parametrize(
    ("wanted", "served", "same"),
    [
        ("m", "M", True),
        ("m", "m-2026-01-31", True),
        ("m", "m-20260131", True),
        ("m", "m-0613", True),
        ("m", "m-002", True),
        ("m", "m-05-20", True),
        ("m", "m:latest", True),
        ("org/m", "m", True),
        ("m", "org/m", True),
        ("org/m", "/models/org/m.gguf", True),
        ("org/m", "other/m", False),
        ("gpt-4", "gpt-4-1", False),
        ("m-2026-01-31", "m", False),
        ("m", "m-mini", False),
        ("Q4_K_M", "Q4_K_S", False),
    ],
)
def test_one_rule_of_names(wanted, served, same):
    assert same_model(wanted, served) is same


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)],
)
def test_threads_of_the_engine_spin_briefly_unless_the_user_says_otherwise(given, spins):
    wanted = with_engine_variables({"PATH": "/bin", **given})
    assert wanted.get("GOMP_SPINCOUNT") == spins
    assert wanted["PATH"] == "/bin" and wanted["GGML_NO_BACKTRACE"] == "1"
