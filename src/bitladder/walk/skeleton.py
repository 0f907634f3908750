"""transformers' own text model without weights, and the calls that its forward makes of its decoder layers.

What a layer is given beside the hidden states (masks, rotary tables, positions) depends on the family and on the length
of the text, hardly ever on the text itself. So transformers' forward is run once for each length with layers that
only note what they are called with; every layer can then be called alone, any number of times, by any member of a
walk, with what transformers would have given it. Models whose layers pass on more than the hidden states, or read the
text a second time, are refused with that reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitladder.errors import UnknownArchitecture
from bitladder.units import MiB, human_bytes

INSTEAD = "Judge its levels by a workload through the engine instead; K-quants need no walk."
_BUFFERS = 256 * MiB
"""More than rotary tables and constants of any model take."""
_TRIED = (2, 5)
"""Windows and tokens of the call that is looked at first."""


def refused(model_type: str, why: str) -> UnknownArchitecture:
    """The error for a model that cannot be walked by transformers' forward."""
    return UnknownArchitecture(f"The layers of '{model_type}' cannot be walked one by one: {why}.", do=INSTEAD)


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with beside the hidden states, and how it answers."""

    arguments: tuple[Any, ...]
    """Those after the hidden states."""
    options: Mapping[str, Any]
    named: str
    """The name by which hidden states are given; empty where they are the first argument."""

    def __call__(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """The layer's answer f32[windows, n, width]."""
        options = {name: type(value)() if _is_store(value) else value for name, value in self.options.items()}
        if self.named:
            out = block(*self.arguments, **{self.named: states}, **options)
        else:
            out = block(states, *self.arguments, **options)
        if any(_is_store(value) and len(value) for value in options.values()):
            raise refused(type(block).__name__[:40], "one leaves more for later ones than hidden states")
        return out if isinstance(out, torch.Tensor) else out[0]


class _Reached(Exception):
    """What a forward was run for is known."""


class Skeleton:
    """A causal language model of transformers on the meta device: parameters have shapes and no memory, buffers that
    are computed (rotary frequencies, scales) are there."""

    def __init__(self, config: Any) -> None:
        """``config``: of the text model, as transformers has it.

        Raises:
            UnknownArchitecture: transformers has no causal language model for it, or it cannot be walked.
        """
        self.config = config
        self.model_type = str(config.model_type)[:40]
        with torch.device("meta"):
            self.model: Any = self._built()
        if not self._filled_buffers():  # constants that only a model with weights has: parameters alone are left out
            with _parameters_on_meta():
                self.model = self._built()
        self.layers_path, self.blocks = self._find_blocks()
        self.base: Any = self._find_base()
        self.embedding: Any = self.base.get_input_embeddings()
        self.head: Any = self.model.get_output_embeddings()
        if self.base is self.model or self.embedding is None or self.head is None:
            raise refused(self.model_type, "transformers does not say where its embedding and its head are")
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._norm_path = ""
        self._tupled = False

    @property
    def n_layer(self) -> int:
        """How many decoder layers there are."""
        return len(self.blocks)

    def path_of(self, module: nn.Module) -> str:
        """Where a module is, in the whole model."""
        return str(next(path for path, one in self.model.named_modules() if one is module))

    def top_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters and stored buffers outside the layers, by path; those of embedding and head, too."""
        prefix = f"{self.layers_path}."
        return {path: value for path, value in self.model.state_dict().items() if not path.startswith(prefix)}

    def layer_parameters(self, layer: int) -> dict[str, torch.Tensor]:
        """Parameters and stored buffers of a layer, by path in it, on the meta device."""
        return dict(self.blocks[layer].state_dict())

    def fill(self, module: nn.Module, path: str, value: torch.Tensor) -> None:
        """Put a value where a parameter or a buffer of ``module`` is."""
        owner, _, leaf = path.rpartition(".")
        target: Any = module.get_submodule(owner)
        if leaf in target._buffers:
            target._buffers[leaf] = value.to(target._buffers[leaf].dtype)
        else:
            setattr(target, leaf, nn.Parameter(value, requires_grad=False))

    def copy_of(self, layer: int) -> nn.Module:
        """A layer's structure, to be filled."""
        block: nn.Module = copy.deepcopy(self.blocks[layer])
        return block

    def _built(self) -> Any:
        from transformers import AutoModelForCausalLM

        implementation = self.config._attn_implementation
        try:
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                self.config, attn_implementation=implementation, trust_remote_code=False
            )
        except Exception as error:
            raise refused(self.model_type, f"transformers cannot build it ({_words(error)})") from error
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model.float().eval()

    def _filled_buffers(self) -> bool:
        """Compute the buffers that no file holds, as transformers does when it loads a model; False where it cannot."""
        owners = [module for module in self.model.modules() if any(b is not None for b in module._buffers.values())]
        size = sum(b.numel() * b.element_size() for one in owners for b in one._buffers.values() if b is not None)
        if size > _BUFFERS:
            raise refused(self.model_type, f"its constants take {human_bytes(size)}")
        for module in owners:
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    unknown = float("nan") if buffer.is_floating_point() else 0
                    module._buffers[name] = torch.full(buffer.shape, unknown, dtype=buffer.dtype, device="cpu")
            with torch.no_grad():
                self.model._init_weights(module)
        held = self.model.state_dict()  # what is stored is filled from the file
        return not any(path not in held and buffer.isnan().any() for path, buffer in self.model.named_buffers())

    def _find_blocks(self) -> tuple[str, Any]:
        """The list of decoder layers: as many as the configuration says, the list nearest to the top."""
        count = getattr(self.config, "num_hidden_layers", None)
        lists = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if not lists:
            raise refused(
                self.model_type, "transformers' model has no list of as many layers as its configuration says"
            )
        return min(lists, key=lambda found: found[0].count("."))

    def _find_base(self) -> Any:
        """The model without its head: the innermost one of transformers' that holds the layers."""
        from transformers import PreTrainedModel

        around = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, PreTrainedModel) and self.layers_path.startswith(f"{path}." if path else "")
        ]
        return max(around, key=lambda found: len(found[0]))[1]

    @contextmanager
    def _layers_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Inside, ``forward(layer, arguments, options)`` is called in the place of each layer."""

        def of(layer: int) -> Callable[..., Any]:
            return lambda *arguments, **options: forward(layer, arguments, options)

        try:
            for layer, block in enumerate(self.blocks):
                block.forward = of(layer)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def calls(self, windows: int, n: int, device: torch.device) -> list[Call]:
        """How each layer is called for a batch of this shape.

        Raises:
            UnknownArchitecture: the layers are not called one after another with hidden states and what depends on
                the shape alone.
        """
        if (windows, n) not in self._calls:
            with torch.inference_mode(False), torch.no_grad():
                found = self._recorded(torch.zeros(windows, n, self.config.hidden_size))
                if not self._calls:
                    self._check_constant(found, windows, n)
            moved = [Call(_moved(c.arguments, device), _moved(dict(c.options), device), c.named) for c in found]
            self._calls = {**self._calls, (windows, n): moved} if len(self._calls) < 64 else {(windows, n): moved}
        return self._calls[windows, n]

    def _check_constant(self, found: list[Call], windows: int, n: int) -> None:
        """What layers are given besides the states may not depend on the states."""
        other = self._recorded(torch.randn(windows, n, self.config.hidden_size))
        for one, two in zip(found, other, strict=True):
            if not _same((one.arguments, one.options), (two.arguments, two.options)):
                raise refused(self.model_type, "its layers are given more of the text than the hidden states")

    def _recorded(self, states: torch.Tensor) -> list[Call]:
        """One run with layers that only note their calls, in both ways that layers answer."""
        for tupled in (False, True):
            calls, passed = self._run_noting(states, tupled=tupled)
            if passed:
                self._tupled = tupled
                return calls
        raise refused(self.model_type, "its layers pass on more than the hidden states")

    def _run_noting(self, states: torch.Tensor, *, tupled: bool) -> tuple[list[Call], bool]:
        """The calls, and whether each layer was given what the one before it gave."""
        calls: list[Call] = []
        given: list[torch.Tensor] = []
        whole = True

        def noted(layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            nonlocal whole
            call, hidden = _call(self.model_type, arguments, options)
            if layer != len(calls) or hidden.shape != states.shape or (given and hidden is not given[-1]):
                whole = False
                raise _Reached
            calls.append(call)
            given.append(hidden + 1)
            return (given[-1],) if tupled else given[-1]

        out: Any = None
        with self._layers_replaced(noted):
            try:
                out = self.base(inputs_embeds=states, use_cache=False)
            except _Reached:
                pass
            except Exception as error:
                if tupled or len(calls) < 1:
                    why = f"its forward cannot be run on embeddings alone ({_words(error)})"
                    raise refused(self.model_type, why) from error
                whole = False
        return calls, whole and len(calls) == self.n_layer and out is not None

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """What enters the first layer for ids int64[windows, n] that are places in ``table`` f32[rows, width]."""
        entered: list[torch.Tensor] = []

        def first(_layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            entered.append(_call(self.model_type, arguments, options)[1])
            raise _Reached

        stored, padding = self.embedding.weight, self.embedding.padding_idx
        self.embedding.weight, self.embedding.padding_idx = nn.Parameter(table, requires_grad=False), None
        try:
            with torch.no_grad(), self._layers_replaced(first):
                self.base(input_ids=ids, use_cache=False)
        except _Reached:
            pass
        finally:
            self.embedding.weight, self.embedding.padding_idx = stored, padding
        return entered[0]

    def find_tail(self) -> None:
        """Find the norm before the head. Parameters outside the layers must be there, but for embedding and head.

        Raises:
            UnknownArchitecture: between the last layer and the head is more than a norm.
        """
        self.calls(*_TRIED, torch.device("cpu"))
        last: list[torch.Tensor] = []
        reads: dict[str, torch.Tensor] = {}

        def passing(_layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            last[:] = [_call(self.model_type, arguments, options)[1] + 1]
            return (last[0],) if self._tupled else last[0]

        with torch.no_grad(), ExitStack() as hooks:
            for path, module in self.base.named_modules():
                if not path.startswith(self._within_base) and not list(module.children()):
                    hooks.callback(module.register_forward_pre_hook(_noting(path, reads, last)).remove)
            hooks.enter_context(self._layers_replaced(passing))
            out = self.base(inputs_embeds=torch.randn(*_TRIED, self.config.hidden_size), use_cache=False)
        found = list(reads)
        states = out[0] if not hasattr(out, "last_hidden_state") else out.last_hidden_state
        if len(found) == 1:
            self._norm_path = found[0]
            with torch.no_grad():
                again = self.norm_structure()(last[0])
            if torch.equal(again, states):
                return
        raise refused(self.model_type, "between its last layer and its head is more than a norm")

    @property
    def norm_path(self) -> str:
        """Where the norm before the head is, in the whole model."""
        return f"{self.path_of(self.base)}.{self._norm_path}"

    def norm_structure(self) -> nn.Module:
        """A copy of the norm before the head, with what it holds."""
        norm: nn.Module = copy.deepcopy(self.base.get_submodule(self._norm_path))
        return norm

    @property
    def _within_base(self) -> str:
        return self.layers_path.removeprefix(f"{self.path_of(self.base)}.")

    def _passing(self, _layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The place of a layer that changes nothing."""
        hidden = _call(self.model_type, arguments, options)[1]
        return (hidden,) if self._tupled else hidden

    def logits_of(self, values: torch.Tensor) -> torch.Tensor:
        """What the model makes of f32[1, n, vocab] that its head gives: a scale, a soft cap, or nothing."""
        self.head.forward = lambda _: values.clone()
        try:
            with torch.no_grad(), self._layers_replaced(self._passing):
                states = torch.zeros(1, values.shape[1], self.config.hidden_size)
                return self.model(inputs_embeds=states, use_cache=False).logits.float()  # type: ignore[no-any-return]
        finally:
            del self.head.forward

    def head_reads(self, values: torch.Tensor) -> torch.Tensor:
        """What the head is given where the norm before it gives f32[1, n, width]."""
        seen: list[torch.Tensor] = []

        def head(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            raise _Reached

        norm = self.base.get_submodule(self._norm_path)
        self.head.forward, norm.forward = head, lambda _: values.clone()
        try:
            with torch.no_grad(), self._layers_replaced(self._passing):
                self.model(inputs_embeds=torch.zeros_like(values), use_cache=False)
        except _Reached:
            pass
        finally:
            del self.head.forward, norm.forward
        return seen[0]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter loses its memory as soon as it is part of a module."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _noting(path: str, reads: dict[str, torch.Tensor], last: list[torch.Tensor]) -> Callable[..., None]:
    def seen(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if last and arguments and arguments[0] is last[0]:
            reads[path] = arguments[0]

    return seen


def _call(model_type: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Call, torch.Tensor]:
    """A call without its hidden states, and those."""
    if arguments and isinstance(arguments[0], torch.Tensor):
        call, hidden = Call(arguments[1:], options, ""), arguments[0]
    elif isinstance(options.get("hidden_states"), torch.Tensor):
        rest = {name: value for name, value in options.items() if name != "hidden_states"}
        call, hidden = Call(arguments, rest, "hidden_states"), options["hidden_states"]
    else:
        raise refused(model_type, "its layers are not given hidden states first")
    stores = [value for value in call.options.values() if _is_store(value) and not len(value)]
    for value in (*call.arguments, *call.options.values()):
        if not _plain(value) and not any(value is one for one in stores):
            raise refused(model_type, f"its layers share a {type(value).__name__[:40]}")
    return call, hidden


def _is_store(value: Any) -> bool:
    """What layers could leave something in for later ones."""
    return isinstance(value, MutableMapping)


def _plain(value: Any) -> bool:
    """A value that a layer cannot leave anything in for later ones."""
    if isinstance(value, (tuple, list)):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(one, device) for name, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if isinstance(value, (tuple, list)) else value


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
