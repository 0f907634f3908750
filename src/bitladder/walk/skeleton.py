"""transformers' own text model without weights, and the calls that its forward makes of its decoder layers.

What a layer is given beside the hidden states (masks, rotary tables, positions) depends on the family and on the length
of the text, hardly ever on the text itself. So transformers' forward is run once for each length with layers that
only note what they are called with; every layer can then be called alone, any number of times, by any member of a
walk, with what transformers would have given it. What layers pass on beside the hidden states is carried with them
(``carried.py``), or the model is refused with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bitladder.errors import UnknownArchitecture
from bitladder.units import MiB, human_bytes
from bitladder.walk import causal
from bitladder.walk.carried import Call, Carried, Given, Left, Place, is_store

INSTEAD = "Judge its levels by a workload through the engine instead; K-quants need no walk."
_BUFFERS = 256 * MiB
"""More than rotary tables and constants of any model take."""
_TRIED = (2, 5)
"""Windows and tokens of the call that is looked at first."""


def refused(model_type: str, why: str) -> UnknownArchitecture:
    """The error for a model that cannot be walked by transformers' forward."""
    return UnknownArchitecture(f"The layers of '{model_type}' cannot be walked one by one: {why}.", do=INSTEAD)


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
        self._streams = 0
        self._items = 0
        self._by_ids = False
        self.carried: Carried | None = None
        self._tables = self._find_tables()

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
        try:
            model = causal.built(self.config)
        except Exception as error:
            raise refused(self.model_type, f"transformers cannot build it ({_words(error)})") from error
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model.float().eval()

    def _filled_buffers(self) -> bool:
        """Compute the buffers that no file holds, as transformers does when it loads a model; False where it cannot."""
        from transformers import PreTrainedModel

        models = {path: one for path, one in self.model.named_modules() if isinstance(one, PreTrainedModel)}
        paths = {
            path: module
            for path, module in self.model.named_modules()
            if any(b is not None for b in module._buffers.values())
        }
        owners = list(paths.values())
        size = sum(b.numel() * b.element_size() for one in owners for b in one._buffers.values() if b is not None)
        if size > _BUFFERS:
            raise refused(self.model_type, f"its constants take {human_bytes(size)}")
        for module in owners:
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    unknown = float("nan") if buffer.is_floating_point() else 0
                    module._buffers[name] = torch.full(buffer.shape, unknown, dtype=buffer.dtype, device="cpu")
        for path, module in paths.items():
            around = (one for one in models if f"{path}.".startswith(f"{one}." if one else ""))
            nearest: Any = models[max(around, key=len)]
            try:
                with torch.no_grad():
                    nearest._init_weights(module)
            except Exception:  # some need what is computed from weights
                return False
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
            UnknownArchitecture: the layers are not called one after another with hidden states, what depends on the
                shape alone, and what can be carried beside the states.
        """
        if (windows, n) not in self._calls:
            with torch.inference_mode(False), torch.no_grad():
                found = self._recorded(windows, n)
                if self.carried is None:
                    self.carried = self._beside(found, self._recorded(windows, n), (windows, n))
            carried = self.carried
            moved = [
                replace(
                    call, arguments=_moved(call.arguments, device), options=_moved(dict(call.options), device),
                    layer=layer, carried=carried,
                )
                for layer, call in enumerate(found)
            ]  # fmt: skip
            self._calls = {**self._calls, (windows, n): moved} if len(self._calls) < 64 else {(windows, n): moved}
        return self._calls[windows, n]

    def _beside(self, one: list[Call], two: list[Call], shape: tuple[int, int]) -> Carried:
        """What has to be carried: arguments that were others for another text, and what layers leave in stores."""
        width = int(self.config.hidden_size) * (self._streams or 1)
        places = [place for place in _places(one[0]) if any(map(partial(_differ, place), one, two))]
        given, at = [], width
        for place in places:
            by_layer = {}
            for layer, call in enumerate(one):
                value = _argument(call, place)
                if not isinstance(value, torch.Tensor) or value.ndim < 3 or not value.is_floating_point():
                    raise refused(self.model_type, "its layers are given more of the text than the hidden states")
                by_layer[layer] = Given(place, at, tuple(value.shape[2:]))
                at = by_layer[layer].stop
            given.append(by_layer)
        return Carried(width, self._streams, tuple(given), self._left(one, at, shape))

    def _left(self, calls: list[Call], at: int, shape: tuple[int, int]) -> tuple[Left, ...]:
        """What layers leave in stores, tried on the meta device, where nothing is computed but shapes."""
        found: dict[tuple[str, Hashable, int], Left] = {}
        stores = {name: value for name, value in calls[0].options.items() if is_store(value)}
        if not stores:
            return ()
        meta = torch.device("meta")
        try:
            for layer, call in enumerate(calls):
                fresh = {name: type(value)(value) for name, value in stores.items()}
                options = {**_moved(dict(call.options), meta), **fresh}
                streams = (self._streams,) if self._streams else ()
                hidden = torch.empty(*streams, *shape, int(self.config.hidden_size), device=meta)
                shaped = replace(call, arguments=_moved(call.arguments, meta), options=options)
                block = self.copy_of(layer).to(meta)
                block(*([] if call.named else [hidden]), *shaped.arguments,
                      **({call.named: hidden} if call.named else {}), **shaped.options)  # fmt: skip
                for name, store in fresh.items():
                    for key, value in store.items():
                        if value is stores[name].get(key):
                            continue
                        for number, left in enumerate(value):
                            place = (name, key, number)
                            heads, columns = left.shape[1], left.shape[3]
                            old = found.get(place)
                            start, layers = (at, frozenset[int]()) if old is None else (old.start, old.layers)
                            found[place] = Left(name, key, number, start, heads, columns, layers | {layer})
                            at += heads * columns if old is None else 0
                        stores[name][key] = value
        except Exception:  # experts choose by values, which are not there; whoever leaves something is noticed later
            return ()
        finally:
            for value in stores.values():
                value.clear()
        return tuple(found.values())

    def _forward(self, model: Any, states: torch.Tensor) -> Any:
        """Run a model of transformers on embeddings ``states``, by whichever door it takes them."""
        if not self._by_ids:
            try:
                return model(inputs_embeds=states, use_cache=False)
            except (_Reached, UnknownArchitecture):
                raise
            except Exception:
                self._by_ids = True
        with self._tables_replaced(states):
            return model(input_ids=torch.zeros(*states.shape[:2], dtype=torch.long), use_cache=False)

    @contextmanager
    def _tables_replaced(self, states: torch.Tensor) -> Iterator[None]:
        """Inside, the embedding gives ``states``, and every other table outside the layers noise."""

        with ExitStack() as replaced:
            for table in self.tables().values():
                given = states if table is self.embedding else torch.randn(*states.shape[:2], table.embedding_dim)
                replaced.enter_context(_giving(table, given))
            yield

    def tables(self) -> dict[str, nn.Embedding]:
        """The tables outside the layers that ids are looked up in, by path in the whole model."""
        return self._tables

    def _find_tables(self) -> dict[str, nn.Embedding]:
        """Of all tables outside the layers those that are given the ids; others are looked up by position."""
        every = {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and not path.startswith(f"{self.layers_path}.")
        }
        ids, seen = torch.full(_TRIED, 3), set[str]()

        def reached(*_: Any) -> Any:
            raise _Reached

        with ExitStack() as replaced, torch.no_grad():
            for path, table in every.items():
                replaced.enter_context(_giving(table, torch.zeros(*_TRIED, table.embedding_dim), path, ids, seen))
            replaced.enter_context(self._layers_replaced(reached))
            with suppress(Exception):  # what comes after the tables has no weights yet
                self.base(input_ids=ids, use_cache=False)
        return {path: table for path, table in every.items() if path in seen or table is self.embedding}

    def _recorded(self, windows: int, n: int) -> list[Call]:
        """One run with layers that only note their calls, in all ways that layers answer."""
        states = torch.randn(windows, n, self.config.hidden_size)
        for items in (0, 1, 2):
            calls, passed = self._run_noting(states, items)
            if passed:
                self._items = items
                return calls
        raise refused(self.model_type, "its layers pass on more than the hidden states")

    def _run_noting(self, states: torch.Tensor, items: int) -> tuple[list[Call], bool]:
        """The calls, and whether each layer was given what the one before it gave. ``items``: as ``_answer``."""
        calls: list[Call] = []
        given: list[torch.Tensor] = []
        whole = True

        def noted(layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            nonlocal whole
            if layer == 0:  # a forward that was begun again
                calls.clear()
                given.clear()
            call, hidden = _call(self.model_type, arguments, options)
            if layer == 0:
                self._streams = len(hidden) if hidden.ndim == states.ndim + 1 else 0
            strange = hidden.shape[-states.ndim :] != states.shape or hidden.ndim > states.ndim + 1
            if layer != len(calls) or strange or (given and not torch.equal(hidden, given[-1])):
                whole = False
                raise _Reached
            calls.append(call)
            given.append(hidden + 1)
            return _answer(given[-1], items)

        out: Any = None
        with self._layers_replaced(noted):
            try:
                out = self._forward(self.base, states)
            except (_Reached, UnknownArchitecture):
                if not calls:
                    raise
            except Exception as error:
                if items == 2 or not calls:
                    why = f"its forward cannot be run without the layers ({_words(error)})"
                    raise refused(self.model_type, why) from error
                whole = False
        return calls, whole and len(calls) == self.n_layer and out is not None

    def embed(self, ids: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What enters the first layer, and what is carried, for ids int64[windows, n] that are places in ``rows``: by
        path of a table outside the layers f32[rows, columns]."""
        entered: list[torch.Tensor] = []
        beside: list[torch.Tensor] = []
        carried = self.carried or Carried(int(self.config.hidden_size) * (self._streams or 1), self._streams)

        def passing(layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            call, hidden = _call(self.model_type, arguments, options)
            entered.append(hidden)
            beside.extend(_argument(call, by_layer[layer].place).flatten(2) for by_layer in carried.given)
            if not carried.given:
                raise _Reached
            return _answer(hidden, self._items)

        tables = self.tables()
        stored = {path: (table.weight, table.padding_idx) for path, table in tables.items()}
        try:
            for path, table in tables.items():
                table.weight, table.padding_idx = nn.Parameter(rows[path], requires_grad=False), None
            with torch.no_grad(), self._layers_replaced(passing):
                self.base(input_ids=ids, use_cache=False)
        except _Reached:
            pass
        finally:
            for path, (weight, padding) in stored.items():
                tables[path].weight, tables[path].padding_idx = weight, padding
        hidden = carried.columns(entered[0])
        empty = hidden.new_zeros(*ids.shape, sum(one.stop - one.start for one in carried.left))
        return torch.cat([hidden, *beside, empty], dim=-1) if carried.total > carried.width else hidden

    def find_tail(self) -> None:
        """Find what comes before the head: a norm, or more. Parameters outside the layers must be there, but for
        embedding and head.

        Raises:
            UnknownArchitecture: it depends on more than what the last layer gives.
        """
        self.calls(*_TRIED, torch.device("cpu"))
        last: list[torch.Tensor] = []
        reads: dict[str, torch.Tensor] = {}

        def passing(_layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            last[:] = [_call(self.model_type, arguments, options)[1] + 1]
            return _answer(last[0], self._items)

        with torch.no_grad(), ExitStack() as hooks:
            for path, module in self.base.named_modules():
                if not path.startswith(self._within_base) and not list(module.children()):
                    hooks.callback(module.register_forward_pre_hook(_noting(path, reads, last)).remove)
            hooks.enter_context(self._layers_replaced(passing))
            out = self._forward(self.base, torch.randn(*_TRIED, self.config.hidden_size))
        found = list(reads)
        states = out[0] if not hasattr(out, "last_hidden_state") else out.last_hidden_state
        if len(found) == 1:
            self._norm_path = found[0]
            with torch.no_grad():
                again = self.norm_structure()(last[0])
            if torch.equal(again, states):
                return
        self._norm_path = ""
        carried = self.carried or Carried(int(self.config.hidden_size))
        with torch.no_grad():
            if torch.equal(self.tail({})(carried.columns(last[0])), states):
                return
        raise refused(self.model_type, "what comes before its head reads more than its last layer gives")

    @property
    def norm_path(self) -> str:
        """Where the norm before the head is, in the whole model; "" where more comes before the head."""
        return f"{self.path_of(self.base)}.{self._norm_path}" if self._norm_path else ""

    def tail(self, values: Mapping[str, torch.Tensor]) -> nn.Module:
        """What comes between the last layer and the head, whatever it is: states f32[windows, n, columns] to
        f32[windows, n, n_embd]. ``values``: parameters by path in the whole model; others are as they are here."""
        shared = {id(one): one for one in (*self.blocks, *self.tables().values())}
        base: nn.Module = copy.deepcopy(self.base, shared)
        within = f"{self.path_of(self.base)}."
        for path, value in values.items():
            if path.startswith(within):
                self.fill(base, path.removeprefix(within), value)
        return _Tail(self, base)

    def after_layers(self, base: Any, states: torch.Tensor) -> torch.Tensor:
        """What the model ``base`` makes of what its last layer gives, f32[windows, n, columns]."""
        carried = self.carried or Carried(states.shape[-1])

        def passing(layer: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            last = layer == self.n_layer - 1
            hidden = carried.hidden(states) if last else _call(self.model_type, arguments, options)[1]
            return _answer(hidden, self._items)

        with self._layers_replaced(passing):
            out = self._forward(base, states.new_zeros(*states.shape[:-1], int(self.config.hidden_size)))
        return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]  # type: ignore[no-any-return]

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
        return _answer(hidden, self._items)

    def logits_of(self, values: torch.Tensor) -> torch.Tensor:
        """What the model makes of f32[1, n, vocab] that its head gives: a scale, a soft cap, or nothing."""
        self.head.forward = lambda _: values.clone()
        try:
            with torch.no_grad(), self._layers_replaced(self._passing):
                states = torch.zeros(1, values.shape[1], self.config.hidden_size)
                return self._forward(self.model, states).logits.float()  # type: ignore[no-any-return]
        finally:
            del self.head.forward

    def head_reads(self, values: torch.Tensor) -> torch.Tensor:
        """What the head is given where the norm before it gives f32[1, n, width]."""
        seen: list[torch.Tensor] = []

        def head(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            raise _Reached

        norm = self.base.get_submodule(self._norm_path)
        self.head.forward = head
        norm.forward = lambda *_, **__: values.clone() if self._norm_path else _Answer(last_hidden_state=values.clone())
        try:
            with torch.no_grad(), self._layers_replaced(self._passing):
                self._forward(self.model, torch.zeros_like(values))
        except _Reached:
            pass
        finally:
            del self.head.forward, norm.forward
        return seen[0]


class _Answer(dict[str, Any]):
    """What a model without a head answers, by name or in order."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, place: Any) -> Any:
        return list(self.values())[place] if isinstance(place, int) else super().__getitem__(place)


class _Tail(nn.Module):
    """``Skeleton.tail``; the model within is no part of it, for most of that has no weights."""

    def __init__(self, skeleton: Skeleton, base: nn.Module) -> None:
        super().__init__()
        self._within = (skeleton, base)

    def to(self, device: torch.device) -> _Tail:  # type: ignore[override]
        """Move what has weights."""
        for module in self._within[1].modules():
            for name, value in module._parameters.items():
                if value is not None and not value.is_meta:
                    module._parameters[name] = nn.Parameter(value.to(device), requires_grad=False)
            for name, held in module._buffers.items():
                if held is not None and not held.is_meta:
                    module._buffers[name] = held.to(device)
        return self

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """As torch calls it; tokens alone are one window."""
        skeleton, base = self._within
        whole = states if states.ndim > 2 else states[None]
        return skeleton.after_layers(base, whole).reshape(*states.shape[:-1], -1)


@contextmanager
def _giving(
    table: nn.Embedding,
    values: torch.Tensor,
    path: str = "",
    ids: torch.Tensor | None = None,
    seen: set[str] | None = None,
) -> Iterator[None]:
    """Inside, a table gives these values; a table that is given ``ids`` is ``seen``."""

    def given(asked: torch.Tensor) -> torch.Tensor:
        if seen is not None and ids is not None and asked.shape == ids.shape and torch.equal(asked, ids):
            seen.add(path)
        return values

    table.__dict__["forward"] = given
    try:
        yield
    finally:
        del table.__dict__["forward"]


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
    stores = [value for value in call.options.values() if is_store(value) and not len(value)]
    for value in (*call.arguments, *call.options.values()):
        if not _plain(value) and not any(value is one for one in stores):
            raise refused(model_type, f"its layers share a {type(value).__name__[:40]}")
    return call, hidden


def _answer(hidden: torch.Tensor, items: int) -> Any:
    """What a layer gives: a tensor, or so many values of which it is the first. Others are left out; a layer that needs
    them from the one before ends the walk when it is looked at."""
    return (hidden, *[None] * (items - 1)) if items else hidden


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


def _places(call: Call) -> list[Place]:
    return [*range(len(call.arguments)), *call.options]


def _argument(call: Call, place: Place) -> Any:
    return call.options[place] if isinstance(place, str) else call.arguments[place]


def _differ(place: Place, one: Call, two: Call) -> bool:
    return not _same(_argument(one, place), _argument(two, place))


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
