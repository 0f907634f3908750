"""Run Bitladder as macOS, then as Windows would, as far as Python can pretend: modules and functions that are not there
are taken away, and ``sys.platform`` says otherwise.

    python as_another_system.py FOLDER MODEL.gguf
    python as_another_system.py serve ARGUMENTS...     a gateway on Windows

What others import is imported first, as on Linux: they are not what is tried.
"""

import importlib
import os
import pkgutil
import signal
import sys
import types
from pathlib import Path

ABSENT = {
    "win32": {
        "modules": ("fcntl", "resource", "pwd", "grp", "uvloop"),
        "os": (
            "sched_getaffinity", "fork", "pread", "pwrite", "fdatasync", "fchmod", "posix_fallocate", "posix_fadvise",
            "getuid", "getgid", "geteuid", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "mkfifo", "chown",
        ),
        "signal": ("SIGKILL", "SIGXCPU", "SIGXFSZ", "SIGHUP", "SIGUSR1", "SIGQUIT"),
        "mmap": ("MADV_DONTNEED",),
    },
    "darwin": {
        "modules": (),
        "os": ("sched_getaffinity", "fdatasync", "posix_fallocate", "posix_fadvise"),
        "signal": (),
        "mmap": (),
    },
}  # fmt: skip
CHILDREN = {"bitladder.files.converter_child", "bitladder.engines.mlx_child"}
"""Programs of their own, which import what lies beside them."""
CUDA_ONLY = {"bitladder.kernels.gptq_triton"}
"""Imported where there is a GPU, whose torch brings Triton."""


def every_module():
    import bitladder

    names = [one.name for one in pkgutil.walk_packages(bitladder.__path__, "bitladder.")]
    return [name for name in names if not name.endswith("__main__") and name not in CHILDREN | CUDA_ONLY]


def pretend(system: str) -> list[object]:
    """Take away what the system lacks; returns what was locked by the stand-in for its locks."""
    absent, locked = ABSENT[system], []
    for name in [name for name in sys.modules if name.split(".")[0] == "bitladder"]:
        del sys.modules[name]
    for name in absent["modules"]:
        sys.modules[name] = None
    for module in (os, signal, importlib.import_module("mmap")):
        for name in absent[module.__name__]:
            if hasattr(module, name):
                delattr(module, name)
    if system == "win32":
        msvcrt = types.ModuleType("msvcrt")
        msvcrt.LK_NBLCK = 2
        msvcrt.locking = lambda handle, mode, count: locked.append((os.lseek(handle, 0, os.SEEK_CUR), mode, count))
        sys.modules["msvcrt"] = msvcrt
        really, sync = os.open, os.fsync
        writing = os.O_WRONLY | os.O_RDWR
        handles = {}

        def opened(path, flags, *rest, **named):
            if Path(path).is_dir():
                raise PermissionError(13, "folders are not opened", str(path))
            handles[handle := really(path, flags, *rest, **named)] = flags
            return handle

        def synced(handle):
            if not handles.get(handle, writing) & writing:
                raise OSError(9, "Bad file descriptor")
            sync(handle)

        os.open, os.fsync = opened, synced
    sys.platform = system
    return locked


def verbs(folder: Path, model: str) -> list[list[str]]:
    """What is run, in this order."""
    quantize = ["quantize", model, "--to", "Q8_0,Q4_0", "--imatrix", "none", "--out", str(folder)]
    measure = ["measure", model, "--levels", "Q8_0", "--text", str(folder / "text.txt"), "--imatrix", "none"]
    made = str(folder / f"{Path(model).stem.removesuffix('-F16')}-Q8_0.gguf")
    return [
        ["plan", model], ["recommend"], ["inspect", model], quantize, quantize, ["inspect", made], measure, ["list"],
        ["machine"],
    ]  # fmt: skip


def serve() -> None:
    """The verb, on an event loop that takes no handlers of signals."""
    import asyncio

    for name in ("bitladder.cli.app", "bitladder.serve.app", "bitladder.stages.measured_levels"):
        importlib.import_module(name)

    def refused(*_):
        raise NotImplementedError

    pretend("win32")
    asyncio.SelectorEventLoop.add_signal_handler = refused
    importlib.import_module("bitladder.cli.app").app(sys.argv[1:])


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    for name in every_module():
        importlib.import_module(name)
    from huggingface_hub import hf_hub_download, scan_cache_dir  # noqa: F401 - found when they are asked for
    from typer.testing import CliRunner

    for system in ("darwin", "win32"):
        locked = pretend(system)
        for name in every_module():
            importlib.import_module(name)
        ours, app = importlib.import_module("bitladder.system"), importlib.import_module("bitladder.cli.app").app
        assert (system == "win32", system == "darwin", False) == (ours.WINDOWS, ours.MACOS, ours.LINUX)
        own = folder / system
        for words in verbs(own, model):
            done = CliRunner().invoke(app, words)
            print(f"{system}$ {' '.join(words)}\n{done.output}")
            assert done.exit_code == 0, f"{words} ended with {done.exit_code}: {done.exception!r}"
        if system == "win32":
            assert locked and all(place >= 1 << 40 for place, _, _ in locked), locked
    print("all of it runs")


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else main()
