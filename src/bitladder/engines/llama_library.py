"""llama.cpp's library inside the engine's wheel, through ctypes: logits at any position, and a look at what every
matrix multiplies.

The wheel exports llama.cpp's C functions (llama.h, ggml.h of the build named in
``files.engine_package.KNOWN_BUILDS``). Their structures
have no version of their own, and a field more or less would be read as another field. So only builds whose headers
were read are used; beyond that the defaults that the library gives are compared with those the header states, and a
context's sizes are read back after it was made.

A fault inside the library ends the process (``GGML_ABORT``), so this is for a child process
(``engines.library_child``). Everything computes on the CPU, on weights mapped from their files.
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.files.engine_package import ENGINE, engine_libraries, engine_version, library_missing

F32, I32 = 0, 26
"""ggml's numbers of these types, which files have, too."""
_FLASH_AUTO, _FLASH_OFF = -1, 0
_PIECE_BYTES = 128 << 20
"""Logits of one piece of a window at most, per model."""
_SHORTEST_PIECE, _LONGEST_PIECE = 32, 512
_SLACK = 256
"""Bytes behind a structure that a build with more fields would write to, instead of to somebody else's memory."""


class LibraryError(Exception):
    """The library refused; the message says what was asked of it."""


class UnfitModel(LibraryError):
    """It loads, and predicts no next token: an encoder, say."""


class _ModelParams(c.Structure):
    _fields_ = [
        ("devices", c.c_void_p), ("tensor_buft_overrides", c.c_void_p), ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32), ("load_mode", c.c_int32), ("lazy_mode", c.c_int32), ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p), ("progress_callback", c.c_void_p), ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p), ("vocab_only", c.c_bool), ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool), ("no_host", c.c_bool), ("no_alloc", c.c_bool), ("load_mtp", c.c_bool),
        ("slack", c.c_uint8 * _SLACK),
    ]  # fmt: skip


class _ContextParams(c.Structure):
    _fields_ = [
        ("n_ctx", c.c_uint32), ("n_batch", c.c_uint32), ("n_ubatch", c.c_uint32), ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32), ("n_outputs_max", c.c_uint32), ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32), ("n_threads_batch", c.c_int32), ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32), ("pooling_type", c.c_int32), ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32), ("rope_freq_base", c.c_float), ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float), ("yarn_attn_factor", c.c_float), ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float), ("yarn_orig_ctx", c.c_uint32), ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p), ("cb_eval_user_data", c.c_void_p), ("type_k", c.c_int32), ("type_v", c.c_int32),
        ("moe_cache_size", c.c_size_t), ("abort_callback", c.c_void_p), ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool), ("offload_kqv", c.c_bool), ("no_perf", c.c_bool), ("op_offload", c.c_bool),
        ("swa_full", c.c_bool), ("kv_unified", c.c_bool), ("samplers", c.c_void_p), ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p), ("slack", c.c_uint8 * _SLACK),
    ]  # fmt: skip


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32), ("token", c.POINTER(c.c_int32)), ("embd", c.c_void_p), ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)), ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]  # fmt: skip


class Tensor(c.Structure):
    """``ggml_tensor``: a node of the graph. ``ne`` are extents, the innermost first; ``nb`` strides in bytes."""


Tensor._fields_ = [
    ("type", c.c_int32), ("buffer", c.c_void_p), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4), ("op", c.c_int32),
    ("op_params", c.c_int32 * 16), ("flags", c.c_int32), ("src", c.POINTER(Tensor) * 10), ("view_src", c.c_void_p),
    ("view_offs", c.c_size_t), ("data", c.c_void_p), ("name", c.c_char * 64), ("extra", c.c_void_p),
    ("padding", c.c_char * 8),
]  # fmt: skip

_EvalCallback = c.CFUNCTYPE(c.c_bool, c.POINTER(Tensor), c.c_bool, c.c_void_p)
Watch = Callable[[Any, bool], bool]
"""Called with a pointer to each node before (True: shall I be called after it, too?) and after it is computed."""

_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "ctx_type": 0, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1,
    "flash_attn_type": _FLASH_AUTO, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_orig_ctx": 0,
    "defrag_thold": -1.0, "cb_eval": None, "type_k": 1, "type_v": 1, "moe_cache_size": 0, "abort_callback": None,
    "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
    "kv_unified": False, "samplers": None, "n_samplers": 0, "ctx_other": None,
}  # fmt: skip
_MODEL_DEFAULTS = {
    "devices": None, "tensor_buft_overrides": None, "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1,
    "lazy_mode": 1, "main_gpu": 0, "tensor_split": None, "progress_callback": None, "kv_overrides": None,
    "vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_host": False, "no_alloc": False,
    "load_mtp": False,
}  # fmt: skip

_P, _I, _U = c.c_void_p, c.c_int32, c.c_uint32
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "llama_backend_init": (None,),
    "ggml_backend_load_all": (None,),
    "llama_model_default_params": (_ModelParams,),
    "llama_context_default_params": (_ContextParams,),
    "llama_model_load_from_file": (_P, c.c_char_p, _ModelParams),
    "llama_model_free": (None, _P),
    "llama_model_get_vocab": (_P, _P),
    "llama_model_has_encoder": (c.c_bool, _P),
    "llama_model_is_diffusion": (c.c_bool, _P),
    "llama_vocab_n_tokens": (_I, _P),
    "llama_init_from_model": (_P, _P, _ContextParams),
    "llama_free": (None, _P),
    "llama_n_ctx": (_U, _P),
    "llama_n_batch": (_U, _P),
    "llama_n_ubatch": (_U, _P),
    "llama_n_seq_max": (_U, _P),
    "llama_n_threads": (_I, _P),
    "llama_get_memory": (_P, _P),
    "llama_memory_clear": (None, _P, c.c_bool),
    "llama_memory_seq_rm": (c.c_bool, _P, _I, _I, _I),
    "llama_batch_init": (_Batch, _I, _I, _I),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (_I, _P, _Batch),
    "llama_get_logits": (c.POINTER(c.c_float), _P),
    "ggml_op_desc": (c.c_char_p, c.POINTER(Tensor)),
    "ggml_nbytes": (c.c_size_t, c.POINTER(Tensor)),
    "ggml_backend_buffer_is_host": (c.c_bool, _P),
}


class Library:
    """The loaded library.

    Raises:
        LibraryError: there is none, its build is not known, or it does not say of itself what its header says.
    """

    def __init__(self) -> None:
        if missing := library_missing():
            raise LibraryError(missing)
        self.call = _loaded()
        self.call.llama_backend_init()
        self.call.ggml_backend_load_all()
        self._compare("llama_context_default_params", _CONTEXT_DEFAULTS)
        self._compare("llama_model_default_params", _MODEL_DEFAULTS)

    def _compare(self, function: str, expected: dict[str, Any]) -> None:
        found = getattr(self.call, function)()
        for name, value in expected.items():
            if getattr(found, name) != value:
                raise LibraryError(f"{function} says {name} = {getattr(found, name)}, its header {value}")

    def is_product(self, node: Any) -> str:
        """``MUL_MAT`` or ``MUL_MAT_ID`` where a node is one, else empty."""
        name: bytes = self.call.ggml_op_desc(node)
        return name.decode() if name in (b"MUL_MAT", b"MUL_MAT_ID") else ""

    def values(self, pointer: Any, kind: type[np.generic]) -> NDArray[Any] | None:
        """A tensor's elements in place, in four axes (the innermost last); None where the CPU cannot see them. Valid
        only while the library does not go on."""
        tensor = pointer.contents
        if not tensor.data or (tensor.buffer and not self.call.ggml_backend_buffer_is_host(tensor.buffer)):
            return None
        count = self.call.ggml_nbytes(pointer)
        raw = np.ctypeslib.as_array(c.cast(tensor.data, c.POINTER(c.c_uint8)), shape=(count,))
        whole = raw[: count // 4 * 4].view(kind)
        return np.lib.stride_tricks.as_strided(
            whole, shape=tuple(tensor.ne)[::-1], strides=tuple(tensor.nb)[::-1], writeable=False
        )


def _loaded() -> Any:
    for path in engine_libraries():
        library = c.CDLL(str(path))
        if all(hasattr(library, name) for name in _FUNCTIONS):
            for name, (result, *arguments) in _FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
    raise LibraryError(f"{ENGINE} {engine_version()} exports no functions of llama.cpp")


def piece_length(n_vocab: int) -> int:
    """Tokens computed at once, so that their logits stay within ``_PIECE_BYTES``."""
    return max(_SHORTEST_PIECE, min(_LONGEST_PIECE, _PIECE_BYTES // (4 * max(1, n_vocab))))


class OpenModel:
    """A model with a context for one window; close it. One user at a time.

    Keys and values are kept in 32 bits, since what a cache loses is no level's loss; or in the types of a ``cache``,
    with the attention that a server would compute over it. Weights stay in the mapped file, where a second copy for
    the processor's vector units would double the memory.
    """

    def __init__(
        self,
        library: Library,
        path: Path,
        *,
        n_ctx: int,
        n_vocab: int,
        threads: int,
        watch: Watch | None = None,
        cache: tuple[int, int] | None = None,
    ) -> None:
        """``n_ctx``: tokens of the longest window. ``n_vocab``: the vocabulary that the model must have. ``watch`` is
        shown every node. ``cache``: ggml's numbers of the types of keys and values; None for 32 bits.

        Raises:
            LibraryError: the model is not loaded.
            UnfitModel: it is of a kind that predicts no next token.
        """
        self._call, self._model, self._context = library.call, None, None
        self.n_vocab, self.piece = n_vocab, min(n_ctx, piece_length(n_vocab))
        try:
            self._open(path)
            self._make_context(n_ctx, threads, watch, cache)
        except BaseException:
            self.close()
            raise
        self._batch = self._call.llama_batch_init(self.piece, 0, 1)

    def _open(self, path: Path) -> None:
        params = self._call.llama_model_default_params()
        self._no_devices = (c.c_void_p * 1)(None)
        params.devices = c.cast(self._no_devices, c.c_void_p)
        params.n_gpu_layers, params.use_extra_bufts = 0, False
        self._model = self._call.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise LibraryError(f"llama.cpp did not load {path}")
        if self._call.llama_model_has_encoder(self._model) or self._call.llama_model_is_diffusion(self._model):
            raise UnfitModel(f"{path} holds a model that does not predict one token after another")
        found = self._call.llama_vocab_n_tokens(self._call.llama_model_get_vocab(self._model))
        if found != self.n_vocab:
            raise LibraryError(f"{path} has {found} tokens in llama.cpp, not {self.n_vocab}")

    def _make_context(self, n_ctx: int, threads: int, watch: Watch | None, cache: tuple[int, int] | None) -> None:
        params = self._call.llama_context_default_params()
        wanted = {"n_ctx": n_ctx, "n_batch": self.piece, "n_ubatch": self.piece, "n_seq_max": 1, "n_threads": threads}
        for name, value in wanted.items():
            setattr(params, name, value)
        params.n_threads_batch, params.n_outputs_max = threads, self.piece
        params.n_outputs_max_per_seq = self.piece  # the default is 1
        params.type_k, params.type_v = cache or (F32, F32)
        if cache is None:
            params.flash_attn_type = _FLASH_OFF  # it would round keys and values to 16 bits all the same
        params.offload_kqv = params.op_offload = False
        if watch is not None:
            self._watch = _EvalCallback(lambda node, ask, _: watch(node, ask))
            params.cb_eval = c.cast(self._watch, c.c_void_p)
        self._context = self._call.llama_init_from_model(self._model, params)
        if not self._context:
            raise LibraryError(f"llama.cpp made no context of {n_ctx} tokens")
        if not self._call.llama_get_memory(self._context):
            raise UnfitModel("The model keeps nothing of the tokens before: it does not predict one after another")
        for name, value in wanted.items():
            made = getattr(self._call, f"llama_{name}")(self._context)
            if made < value or (made != value and name != "n_ctx"):  # contexts are rounded up
                raise LibraryError(f"llama.cpp made a context with {name} = {made}, not {value}")

    def clear(self, keep: int = 0) -> int:
        """Forget the tokens before, since a new window begins, but for the first ``keep``; how many are left, which is
        0 where the model's memory cannot go back (a recurrent state)."""
        memory = self._call.llama_get_memory(self._context)
        if keep and self._call.llama_memory_seq_rm(memory, 0, keep, -1):
            return keep
        self._call.llama_memory_clear(memory, True)
        return 0

    def decode(self, tokens: Sequence[int], start: int, outputs: Sequence[bool]) -> NDArray[np.float32]:
        """The logits f32[wanted, n_vocab] of tokens at positions from ``start`` on, where ``outputs`` wants them; in
        place, valid until the next call. At most ``piece`` tokens.

        Raises:
            LibraryError: the library could not compute them.
        """
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, (token, wanted) in enumerate(zip(tokens, outputs, strict=True)):
            batch.token[at], batch.pos[at], batch.logits[at] = token, start + at, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        code = self._call.llama_decode(self._context, batch)
        if code:
            raise LibraryError(f"llama.cpp could not compute {len(tokens)} tokens (llama_decode gave {code})")
        rows = sum(map(bool, outputs))
        if not rows:
            return np.empty((0, self.n_vocab), np.float32)
        logits = self._call.llama_get_logits(self._context)
        if not logits:
            raise UnfitModel("The model gives no logits")
        return np.ctypeslib.as_array(logits, shape=(rows, self.n_vocab))

    def close(self) -> None:
        """Give its memory back."""
        if self._context:
            self._call.llama_free(self._context)
        if self._model:
            self._call.llama_model_free(self._model)
        self._context = self._model = None
