"""macOS and Windows, as far as Linux can try them: what they lack is taken away, and the verbs run all the same."""

import ast
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bitladder import system
from cloud_server import serving
from engine_model import write_engine_model
from serving_process import ask, own_environment, started

SRC = Path(system.__file__).parent
OF_ONE_SYSTEM = {"fcntl", "resource", "pwd", "grp", "msvcrt", "winreg", "termios"}


def test_no_other_module_imports_what_only_one_system_has():
    wrong = []
    for path in SRC.rglob("*.py"):
        if path.name in ("system.py", "converter_child.py"):  # the child imports nothing of ours
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.relative_to(SRC)}: {name}" for name in names if name in OF_ONE_SYSTEM]
    assert not wrong


def test_the_verbs_run_as_on_another_system(tmp_path):
    model = write_engine_model(tmp_path / "tiny-F16.gguf")
    for name in ("darwin", "win32"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    environment = {**os.environ, "BITLADDER_CACHE": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "as_another_system.py"), str(tmp_path), str(model)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all of it runs" in done.stdout
    written = {name: (tmp_path / name / "tiny-Q4_0.gguf").read_bytes() for name in ("darwin", "win32")}
    assert written["darwin"] == written["win32"] and not list(tmp_path.rglob("*.part*"))


def test_a_gateway_without_uvloop_and_handlers_of_signals(tmp_path):
    program = [sys.executable, str(Path(__file__).parent / "as_another_system.py")]
    with serving(lambda prompt: f"You said {prompt}") as cloud:
        command = [*program, "serve", f"{cloud.url}#m", "--port", "0"]
        with started(command, tmp_path, own_environment(tmp_path / "data"), tmp_path / "log") as url:
            reply = ask(url).json()
        several = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True, check=False)
    assert reply["choices"][0]["message"]["content"] == "You said Hello"
    assert several.returncode == 2 and "one process" in several.stderr


class TestStandIns:
    """What is used where a function is missing does what the function does."""

    @pytest.fixture
    def handle(self, tmp_path):
        made = system.open_file(tmp_path / "file", "O_RDWR", "O_CREAT")
        yield made
        os.close(made)

    def test_pieces_from_several_threads(self, handle, monkeypatch):
        monkeypatch.delattr(os, "pwrite")
        monkeypatch.delattr(os, "pread")
        pieces = [bytes([number]) * 1000 for number in range(64)]
        threads = [
            threading.Thread(target=system.write_at, args=(handle, piece, 1000 * number))
            for number, piece in enumerate(pieces)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole = hashlib.sha256(b"".join(pieces)).digest()
        assert hashlib.sha256(system.read_at(handle, 64_000, 0)).digest() == whole
        assert system.read_at(handle, 10, 63_995) == pieces[63][:5]

    def test_room_that_is_not_there(self, handle, monkeypatch):
        monkeypatch.delattr(os, "posix_fallocate")
        with pytest.raises(OSError, match="No space"):
            system.reserve(handle, 1 << 60)
        system.reserve(handle, 1 << 20)
        assert os.fstat(handle).st_size == 1 << 20

    def test_links_are_not_followed(self, tmp_path, monkeypatch):
        (tmp_path / "mine").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "mine")
        for _ in range(2):
            with pytest.raises(OSError, match="symbolic links"):
                system.open_file(tmp_path / "link", "O_RDWR", "O_NOFOLLOW")
            monkeypatch.delattr(os, "O_NOFOLLOW", raising=False)

    def test_one_alone_has_a_file(self, tmp_path, handle):
        other = system.open_file(tmp_path / "file", "O_RDWR")
        assert system.lock_alone(handle) and not system.lock_alone(other)
        os.close(other)

    def test_endings(self):
        assert system.ended_by(-9, "SIGKILL") and not system.ended_by(0, "SIGKILL", "SIGNONE")
        assert not system.ended_by(None, "SIGKILL") and not system.ended_by(9, "SIGKILL")

    def test_a_second_name_without_the_right_to_link(self, tmp_path, monkeypatch):
        (tmp_path / "a").write_text("a")
        monkeypatch.setattr(system, "WINDOWS", True)
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError(1314, "no right")))
        system.refer_to(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").samefile(tmp_path / "a")
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(17, "another drive")))
        system.refer_to(tmp_path / "a", tmp_path / "c")
        assert (tmp_path / "c").read_text() == "a" and not (tmp_path / "c").samefile(tmp_path / "a")


def test_memory_and_files():
    assert system.peak_memory() > 10 << 20
    assert system.allow_open_files(64) >= 64
