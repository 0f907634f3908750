"""Kernels as machine code on disk, called without numba.

Importing numba, setting it up and asking its cache takes most of a second, as long as quantizing a small model. So
numba only compiles: what LLVM makes of a kernel is kept as an object file, and later runs load that with LLVM's own
loader in a few milliseconds.

    first call   import the kernel's module, let numba compile it for the types of the arguments, keep the object file
    later runs   object file -> loader -> address -> ctypes, which lets go of the interpreter's lock while it runs

An object file's name says what it was made from: the kernels' source files, the installed Python, numba and
llvmlite, and the processor with its instructions. Nothing that changed is ever taken for current, and in a folder that
several machines share each finds only what it can run.

How numba's functions are called (numba/core/callconv.py, numba/core/datamodel/models.py): a status is returned, 0
for success; the arguments are a pointer to the result, a pointer to a pointer to an exception, and then everything
else laid flat. A contiguous array is (owner, parent, elements, bytes per element, address, shape, strides).
"""

# mypy: disable-error-code="no-untyped-call,import-untyped"

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np
import platformdirs

_HERE = Path(__file__).parent
SOURCES = ("affine", "codebook", "compiled", "decode", "floats", "lanes", "pack", "plain", "rows", "scale", "sixteen")
"""Modules that the kernels are made of."""
_FREE = "NRT_MemInfo_call_dtor"
"""What numba calls to free an array that nobody holds any more. Ours are held by their caller: it is never called."""
_LIBC = {"memset", "memcpy", "memmove"}
_DIGEST = hashlib.sha256().digest_size
_LOCK = threading.Lock()


class Compiled:
    """The kernel ``name`` of a module."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name
        self._call: Callable[..., int] | None = None
        self._held: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> int:
        """Call it with contiguous arrays, whole numbers and named tuples of both, of the same types every time; returns
        a whole number.

        Raises:
            TypeError: an array is not contiguous.
        """
        flat = _flat(args)
        call = self._call or self._load(args, len(flat))
        result, failure = ctypes.c_int64(0), ctypes.c_void_p()
        status = call(ctypes.byref(result), ctypes.byref(failure), *flat)
        if status:
            raise RuntimeError(f"the kernel {self.name} ended with status {status}")
        return result.value

    def _load(self, args: tuple[Any, ...], width: int) -> Callable[..., int]:
        """Machine code for arguments of these types; one thread makes it ready, the others wait."""
        with _LOCK:
            if self._call is None:
                file_name = f"{self.name}-{_digest(self.module, _kinds(args))[:24]}.o"
                machine = _machine()
                code = _stored(file_name)
                if code is None:
                    code = self._compile(args, machine)
                    _keep(file_name, code)
                engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
                engine.add_object_file(llvm.ObjectFileRef.from_data(code))
                engine.finalize_object()
                pointers, numbers = [ctypes.c_void_p] * 2, [ctypes.c_int64] * width
                self._held = (engine, machine)
                self._call = ctypes.CFUNCTYPE(ctypes.c_int32, *pointers, *numbers)(
                    engine.get_function_address(self.name)
                )
            return self._call

    def _compile(self, args: tuple[Any, ...], machine: Any) -> bytes:
        """Let numba write the kernel's LLVM code, and translate it."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        signature = tuple(_type_of(arg) for arg in args)
        kernel.compile(signature)
        module = llvm.parse_assembly(kernel.inspect_llvm(signature))
        module.link_in(llvm.parse_assembly(f"define void @{_FREE}(ptr %held) {{ ret void }}"))
        module.get_function(kernel.overloads[signature].fndesc.llvm_func_name).name = self.name
        declared = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
        if declared - _LIBC:
            raise TypeError(f"the kernel {self.name} calls {', '.join(sorted(declared - _LIBC))}, which numba keeps")
        code: bytes = machine.emit_object(module)
        return code


def _kinds(args: tuple[Any, ...]) -> str:
    """The types of arguments in words; those of a tuple are in its source."""
    return " ".join(
        f"{arg.dtype.str}{arg.ndim}" if isinstance(arg, np.ndarray) else "tuple" if isinstance(arg, tuple) else "int"
        for arg in args
    )


def _type_of(arg: Any) -> Any:
    """An argument's type in numba: what is neither array nor tuple is a whole number."""
    from numba import typeof, types

    if isinstance(arg, tuple):
        return types.BaseTuple.from_types([_type_of(field) for field in arg], type(arg))
    return typeof(arg) if isinstance(arg, np.ndarray) else types.int64


def _flat(args: tuple[Any, ...]) -> list[int]:
    """Arguments as numba lays them out."""
    flat: list[int] = []
    for arg in args:
        if isinstance(arg, np.ndarray):
            if not arg.flags.c_contiguous:
                raise TypeError(f"a kernel needs contiguous arrays. Got strides {arg.strides} instead.")
            flat += (0, 0, arg.size, arg.itemsize, arg.ctypes.data, *arg.shape, *arg.strides)
        elif isinstance(arg, tuple):
            flat += _flat(arg)
        else:
            flat.append(int(arg))
    return flat


@functools.cache
def _target() -> tuple[str, str, str]:
    """Triple, processor and features to compile for: this machine's, or what numba's variables NUMBA_CPU_NAME,
    NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX name, as numba reads them (numba/core/config.py, codegen.py).
    """
    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if features is None and (name or "").lower() == "generic":
        features = ""
    if features is None:
        found = llvm.get_host_cpu_features()
        if os.environ.get("NUMBA_ENABLE_AVX") == "0":
            found.update({feature: False for feature in found if feature.startswith("avx")})
        features = found.flatten()
    return llvm.get_process_triple(), llvm.get_host_cpu_name() if name is None else name, features


def _machine() -> Any:
    """LLVM's code generator for this processor; an engine owns its own."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, name, features = _target()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=3)


def _digest(module: str, kinds: str) -> str:
    """Everything that decides what the machine code is."""
    paths = [_HERE / f"{name}.py" for name in SOURCES]
    for name in ("numba", module):  # finding numba is quick, importing it or asking for its version is not
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"{name}, which the kernels need, is not installed", name=name)
        paths.append(Path(found.origin))
    digest = hashlib.sha256("\0".join((sys.version, llvmlite.__version__, *_target(), module, kinds)).encode())
    digest.update(str(paths[-2].stat().st_mtime_ns).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _folders() -> Iterator[Path]:
    """Where object files may lie: in the folder that numba's own variable names, or beside the sources' bytecode, or
    in the user's cache.
    """
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(chosen)
        return
    yield _HERE / "__pycache__"
    cache = os.environ.get("BITLADDER_CACHE") or platformdirs.user_cache_dir("bitladder", appauthor=False)
    yield Path(cache).expanduser() / "kernels"


def _stored(file_name: str) -> bytes | None:
    """A kept object file, if it is there and whole."""
    for folder in _folders():
        try:
            data = (folder / file_name).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
            return data[_DIGEST:]
    return None


def _keep(file_name: str, code: bytes) -> None:
    """Keep an object file in the first folder that takes it; where none does, every run compiles."""
    for folder in _folders():
        being_written = folder / f"{file_name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            being_written.write_bytes(hashlib.sha256(code).digest() + code)
            being_written.replace(folder / file_name)
        except OSError:
            continue
        return
