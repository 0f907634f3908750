"""A model of any family that transformers runs, walked layer by layer through transformers' own whole forward.

``LayeredModel`` fills layers by a row that was written for their family. Here nothing is known of the family: the model
is built from the checkpoint's own config.json (``skeleton.py``), which tensor of the GGUF file is which parameter is
found by comparing the two (``correspondence.py``), and what shares an input by looking (``discovered.py``). Weights
come from the GGUF file all the same, so that everything reads one file; each layer's are compared with the
checkpoint's before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.describe.model import Model
from bitladder.errors import BadFile, BadInput, UnknownArchitecture
from bitladder.files.safetensors_writer import PiecewiseTensor
from bitladder.files.staging import clean_json
from bitladder.formats import roles
from bitladder.formats.disk_names import quantized_parameters
from bitladder.formats.families.family import DiskNames, LayerKind, Layers
from bitladder.formats.roles import SharedInput, layer_tensor
from bitladder.kernels.gpu import check_device
from bitladder.levels.checkpoints import CheckpointFormat
from bitladder.walk import causal
from bitladder.walk.carried import LeavesMore
from bitladder.walk.checkpoint_layers import CheckpointLayers
from bitladder.walk.correspondence import ParameterLayout, Reshaped, correspond
from bitladder.walk.discovered import FoundKind, MadeOf, discover
from bitladder.walk.expert_names import linear_experts, names_on_disk
from bitladder.walk.layers import Entry, LayeredModel, Weights, inference, tensor_at
from bitladder.walk.rounding import QTypeOf, round_inputs
from bitladder.walk.skeleton import Skeleton, refused
from bitladder.walk.transforms import apply
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
_TOP = ("token_embd.weight", "output.weight")
_AT_ONCE = 1 << 20


def text_config(folder: Path) -> Any:
    """transformers' configuration of a checkpoint's text model: values alone, no code, no quantization.

    Raises:
        BadFile: config.json is not what its name says.
        UnknownArchitecture: transformers does not know the model type.
    """
    from transformers import CONFIG_MAPPING

    values = clean_json(folder / "config.json")
    if not isinstance(values, dict):
        raise BadFile(f"{folder / 'config.json'} holds a {type(values).__name__}, not an object.")
    values = _plain_floats(values)
    values.pop("quantization_config", None)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise refused(str(kind)[:40], "transformers does not know this model type")
    try:
        config = CONFIG_MAPPING[kind].from_dict(values).get_text_config(decoder=True)
    except Exception as error:  # whatever a configuration's own checks raise
        why = f"transformers cannot read its config.json ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        raise refused(kind, why) from error
    return usable(config)


def usable(config: Any) -> Any:
    """The configuration, set to what is compared and calibrated: one plain pass in 32-bit floats."""
    config.use_cache = False
    config.dtype = torch.float32
    # a soft cap on attention scores is in the plain formula alone; the loop over experts needs no fused kernels
    config._attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    config._experts_implementation = "eager"
    return config


def _plain_floats(value: Any) -> Any:
    """Numbers that JSON does not know, as transformers writes them."""
    if isinstance(value, dict):
        tag = value.get("__float__") if len(value) == 1 else None
        if isinstance(tag, str) and tag.removeprefix("-") in ("Infinity", "NaN"):
            return float(tag.replace("Infinity", "inf").replace("NaN", "nan"))
        return {key: _plain_floats(one) for key, one in value.items()}
    return [_plain_floats(one) for one in value] if isinstance(value, list) else value


def skeleton_of(config: Any) -> Skeleton:
    """The model without weights, with attention by torch's own kernel where transformers has that for it."""
    found = causal.class_of(config)
    if found is not None and not getattr(found, "_supports_sdpa", False):
        config._attn_implementation = "eager"
    return Skeleton(config)


@dataclass
class Findings:
    """What was found by looking at the layers of a file and its checkpoint: the same as long as both are."""

    kinds: list[FoundKind] = field(default_factory=list)
    kind_of: dict[int, int] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    in_turn: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    checked: set[int] = field(default_factory=set)
    """Layers whose file was found to hold what the checkpoint does."""


class WholeModel(LayeredModel):
    """A ``LayeredModel`` for a family without a row; nothing of how rows are used is inherited.

    Raises:
        UnknownArchitecture: transformers does not run it, its layers share more than hidden states, or the file's
            matrices are not found among its parameters.
        BadFile, BadInput: file and checkpoint are not of one model.
        UsageError: torch has no such device here.
    """

    at_once = False  # a call belongs to a text's shape, and may carry what layers leave one another

    def __init__(
        self,
        model: Model,
        weights: LevelWeights,
        checkpoint: Path,
        *,
        device: str = "cpu",
        findings: Findings | None = None,
    ) -> None:  # ``LayeredModel``'s own is about rows
        """``weights``: those of the file itself. ``findings``: those of an earlier look at the very same two."""
        if device != "cpu":
            check_device(device)
        self.model, self.device, self._source = model, torch.device(device), weights
        self.config = text_config(checkpoint)
        self._check_count()
        self._skeleton = skeleton_of(self.config)
        self._checkpoint = CheckpointLayers(checkpoint, self._skeleton)
        self.n_layer: int = self._skeleton.n_layer
        if self.config.hidden_size != model.dims.n_embd:
            wide = f"hidden states are {self.config.hidden_size} wide there, {model.dims.n_embd} here"
            raise self._other_model(wide)
        self._names = {tensor.name for tensor in model.tensors}
        self.embedding = roles.EMBEDDING
        self.output = roles.OUTPUT if roles.OUTPUT in self._names else roles.EMBEDDING
        self._fill_top()
        self.width: int = self._skeleton.carried.total if self._skeleton.carried else model.dims.n_embd
        self.logit_softcap, self._logit_scale = self._after_head()
        self.findings = own = findings or Findings()
        self._kinds, self._kind_of, self._checked = own.kinds, own.kind_of, own.checked
        self._experts, self._in_turn, self._renamed = own.experts, own.in_turn, own.renamed
        signatures: dict[Hashable, int] = {}
        for layer in range(self.n_layer if findings is None else 0):
            signature = self._signature(layer)
            if signature not in signatures:
                signatures[signature] = self._discovered(layer)
            self._kind_of[layer] = signatures[signature]
        self.family = self._row()

    def _check_count(self) -> None:
        """Before anything is built: no more layers than the file has."""
        count, width = getattr(self.config, "num_hidden_layers", None), getattr(self.config, "hidden_size", None)
        if not isinstance(count, int) or not 0 < count <= self.model.dims.n_layer or not isinstance(width, int):
            raise self._other_model(f"config.json says {count} layers, the file {self.model.dims.n_layer}")

    def _other_model(self, why: str) -> BadInput:
        return BadInput(
            f"The GGUF file and the checkpoint beside it are not of one model: {why}.",
            means="The folder was changed after it was converted.",
            do="Give the checkpoint folder itself, which is then converted again.",
        )

    def _signature(self, layer: int) -> Hashable:
        block = self._skeleton.blocks[layer]
        shapes = tuple((path, tuple(value.shape)) for path, value in self._skeleton.layer_parameters(layer).items())
        present = tuple(path for path, _ in block.named_modules())
        stored = tuple(sorted(name.split(".", 2)[2] for name in self._names if name.startswith(f"blk.{layer}.")))
        return type(block).__name__, shapes, present, stored

    # What lies outside the layers

    def _fill_top(self) -> None:
        """Give the skeleton what it holds outside the layers, but for embedding and head, and find the last norm."""
        skeleton = self._skeleton
        large = {f"{path}.weight" for path in (*skeleton.tables(), skeleton.path_of(skeleton.head))}
        wanted = {path: value for path, value in skeleton.top_parameters().items() if path not in large}
        held = self._checkpoint.top(wanted)
        for path, value in held.items():
            skeleton.fill(skeleton.model, path, torch.from_numpy(value.copy()))
        self._beside = held
        skeleton.find_tail()
        norm = f"{skeleton.norm_path}."
        largest = sum(value.size for value in held.values())
        stored = {
            name: self._source(name)
            for name in sorted(self._names)
            if not name.startswith("blk.")
            and name not in (*_TOP, *roles.ROPE_TENSORS)
            and int(np.prod(self._shape(name), dtype=int)) <= largest
        }
        likely = {f"{norm}weight": roles.OUTPUT_NORM, f"{norm}bias": roles.OUTPUT_NORM.replace("weight", "bias")}
        found = correspond(held, stored, rounded=self._rounded, likely=likely)
        self._norm = {path.removeprefix(norm): one for path, one in found.items() if path.startswith(norm)}
        if any(path.startswith(norm) and path not in found for path in held):
            raise refused(skeleton.model_type, "the file has no tensor that is the norm before its head")
        plain = not skeleton.norm_path
        self._around = {
            path: one for path, one in found.items() if not path.startswith(norm) and (plain or held[path].ndim > 1)
        }
        self.head_bias = self._find_head_bias(held, found)
        self._tables = {path: self._table(path) for path in skeleton.tables()}

    def _find_head_bias(self, held: Mapping[str, F32], found: Mapping[str, object]) -> F32 | None:
        if self._skeleton.head.bias is None:
            return None
        path = f"{self._skeleton.path_of(self._skeleton.head)}.bias"
        if path not in found:
            raise refused(self._skeleton.model_type, "the file has no tensor that is the bias of its head")
        return held[path]

    def _table(self, path: str) -> str:
        """The file's tensor that a table of rows for ids is; other tables than the embedding by some of their rows."""
        skeleton = self._skeleton
        if skeleton.tables()[path] is skeleton.embedding:
            return roles.EMBEDDING
        rows, columns = skeleton.tables()[path].weight.shape
        some = np.unique(np.linspace(0, rows - 1, 8).astype(np.int64))
        wanted = self._checkpoint.rows(f"{path}.weight", some)
        for name in sorted(self._names):
            fits = not name.startswith("blk.") and self._shape(name)[-1:] == (columns,) and self._shape(name)[0] >= rows
            if fits and np.array_equal(self._source(name, some), self._rounded(wanted, name)):
                return name
        raise refused(skeleton.model_type, f"the file has no tensor that is its table '{path[-40:]}'")

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(tensor.shape for tensor in self.model.tensors if tensor.name == name)

    @property
    def embedded(self) -> tuple[str, ...]:
        """As ``LayeredModel``."""
        around = (name for names, _ in self._around.values() for name in names)
        return tuple(dict.fromkeys((*self._tables.values(), *around)))

    @property
    def norm_names(self) -> tuple[str, ...]:
        """The file's tensors that the norm before the head is made of."""
        used = self._norm if self._skeleton.norm_path else self._around
        return tuple(dict.fromkeys(name for names, _ in used.values() for name in names))

    def _after_head(self) -> tuple[float | None, float]:
        """The soft cap on logits, and what they (and what the head reads) are multiplied by."""
        skeleton = self._skeleton
        vocab = int(skeleton.head.weight.shape[0])
        values = torch.zeros(1, 1, vocab)
        tried = torch.tensor([1e-3, -1e-3, 1.0, -2.0, 10.0, 30.0, -75.0, 1e6])
        values[0, 0, : len(tried)] = tried[:vocab]
        logits = skeleton.logits_of(values)[0, -1, : len(tried)]
        read = skeleton.head_reads(torch.ones(1, 2, self.model.dims.n_embd))
        factor = float(read.reshape(-1)[0])
        scale = float(logits[0] / tried[0])
        if self.head_bias is not None:
            self.head_bias = self.head_bias * np.float32(scale)
        if bool((read == read.reshape(-1)[0]).all()):
            if torch.allclose(logits, scale * tried[:vocab], rtol=1e-5):
                return None, factor * scale
            cap = float(logits[-1])
            if torch.allclose(logits, cap * torch.tanh(scale * tried[:vocab] / cap), rtol=1e-4):
                return cap, factor * scale
        raise refused(skeleton.model_type, "what it does to logits is neither a scale nor a soft cap")

    def norm(self, weights: Weights) -> nn.Module:
        """The norm before the head, filled; what the head gives of its outputs are the model's logits, a soft cap
        apart."""
        if not self._skeleton.norm_path:
            return self._scaled(self._skeleton.tail(self._around_layers(weights)))
        module = self._skeleton.norm_structure()
        for path, (names, layout) in self._norm.items():
            value = layout.parameter([weights(name) for name in names])
            self._skeleton.fill(module, path, torch.from_numpy(np.ascontiguousarray(value)))
        own = self.model.dims.n_embd
        if self.width > own:  # what is carried beside the hidden states ends here
            module.register_forward_pre_hook(lambda _module, given: (given[0][..., :own],))
        return self._scaled(module)

    def _scaled(self, module: nn.Module) -> nn.Module:
        if self._logit_scale != 1:
            scale = self._logit_scale
            module.register_forward_hook(lambda _module, _given, out: out * scale)
        return module.to(self.device)

    def _around_layers(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Parameters outside the layers as a level has them, by path in the whole model."""
        return {
            path: torch.from_numpy(np.ascontiguousarray(layout.parameter([weights(name) for name in names])))
            for path, (names, layout) in self._around.items()
        }

    def embed(self, tokens: NDArray[np.int64], weights: Weights) -> torch.Tensor:
        """As ``LayeredModel``: whatever transformers does between ids and the first layer."""
        used, where = np.unique(tokens, return_inverse=True)
        rows = {}
        for path, name in self._tables.items():
            there = np.minimum(used, self._shape(name)[0] - 1)  # ids that stand for pictures and sounds have no row
            rows[path] = torch.from_numpy(np.ascontiguousarray(weights(name, there)))
        for path, value in self._around_layers(weights).items():
            self._skeleton.fill(self._skeleton.model, path, value)
        with inference():
            return self._skeleton.embed(torch.from_numpy(where.reshape(tokens.shape)), rows).to(self.device)

    @property
    def embedding_energy(self) -> float:
        """The square of what embeddings are multiplied by."""
        own = self.model.dims.n_embd
        tables = {path: torch.randn(2, table.embedding_dim) for path, table in self._skeleton.tables().items()}
        entered = self._skeleton.embed(torch.tensor([[0, 1]]), tables)[0][..., :own]
        return float(entered.square().sum() / tables[self._skeleton.path_of(self._skeleton.embedding)].square().sum())

    @property
    def beside(self) -> dict[str, torch.Tensor]:
        """As ``LayeredModel``."""
        norm = f"{self._skeleton.norm_path}."  # of a tail that is more than a norm nothing begins so
        others = {path: value for path, value in self._beside.items() if not path.startswith(norm)}
        return {self._checkpoint.top_name(path): torch.from_numpy(value) for path, value in others.items()}

    def copied(self) -> list[PiecewiseTensor]:
        """As ``LayeredModel``."""
        names = self.family.disk
        norm = {self._checkpoint.top_name(f"{self._skeleton.norm_path}.{leaf}") for leaf in ("weight", "bias")}
        return self._checkpoint.others({names.embedding, names.head, *norm, *self.beside})

    def check_disk_names(self, forms: Iterable[CheckpointFormat]) -> None:
        """As ``LayeredModel``.

        Raises:
            UnknownArchitecture: experts lie in one tensor, and nothing tells what their linear layers are; or a matrix
                has a column for each output, and the format stores it under the name by which readers turn it.
        """
        forms = tuple(forms)
        for _, row in self.first_of_each_kind() if forms else ():
            for shared in row.inputs:
                for parameter in quantized_parameters(self.family, shared):
                    if why := self._misplaced(parameter, shared, forms):
                        raise UnknownArchitecture(
                            f"Checkpoint levels of '{self._skeleton.model_type}' cannot be written: its "
                            f"'{parameter.path}' {why}.",
                            means="Readers of such levels would find no matrix, or another one.",
                            do="Choose GGUF levels: K-quants, with error feedback too (GPTQ-Q4_K_M), and recipes work.",
                        )

    def _misplaced(self, parameter: roles.Parameter, shared: SharedInput, forms: Iterable[CheckpointFormat]) -> str:
        """Why a matrix has no place in a checkpoint of one of these formats; "" where it has."""
        if parameter.path in self._experts:
            return ""
        if shared.kind != "linear":
            return "holds all experts in one tensor, and nothing says which part of it is gate, up or down"
        if parameter.turned and (plain := next((form for form in forms if "weight" in form.suffixes), None)):
            return f"lies transposed on disk, and readers would turn it there ('{plain.layout}')"
        return ""

    # Layers

    def _discovered(self, layer: int) -> int:
        """Look at a layer; the number of its kind."""
        values = self._checkpoint.layer(layer)
        prefix = f"blk.{layer}."
        stored = {name: self._source(name) for name in sorted(self._names) if name.startswith(prefix)}
        rotary = {name for name in stored if name.endswith(roles.ROPE_TENSORS)}
        stored = {name: value for name, value in stored.items() if name not in rotary}
        likely = {path: f"{prefix}{role}" for path, role in self._likely(values, layer).items()}
        found = correspond(values, stored, rounded=self._rounded, likely=likely)
        made_of = {
            path: (tuple(name.removeprefix(prefix) for name in names), _named(layout))
            for path, (names, layout) in found.items()
        }
        used = {name for names, _ in found.values() for name in names}
        lost = [name for name in stored if name not in used and min(self._matrix(name)) > 1]
        if lost:
            own = self._checkpoint.ignored(layer)
            unread = correspond(own, {name: stored[name] for name in lost}, rounded=self._rounded)
            lost = [name for name in lost if not any(name in names for names, _ in unread.values())]
        if lost:
            raise refused(
                self._skeleton.model_type,
                f"it is not known how llama.cpp's converter made '{lost[0]}' of its checkpoint",
            )
        block = self._skeleton.copy_of(layer)
        for path, value in values.items():
            self._skeleton.fill(block, path, torch.from_numpy(value))
        block.to(self.device)
        try:
            kind = discover(block, self._runner(layer), self.width, made_of, self._value_channels())
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            words = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            raise refused(self._skeleton.model_type, f"layer {layer} cannot be run alone ({words})") from error
        self._find_disk_names(layer, values, made_of)
        self._kinds.append(kind)
        self._checked.add(layer)
        return len(self._kinds) - 1

    def _matrix(self, name: str) -> tuple[int, ...]:
        """Rows and columns of a tensor; a vector has one column."""
        shape = tuple(size for size in self._shape(name) if size != 1)
        return (1, *shape)[-2:]

    def _rounded(self, value: F32, name: str) -> F32:
        """Values as the type of a tensor holds them."""
        qtype = self._source.qtype(name)
        if qtype in ("F16", "BF16"):
            dtype = torch.float16 if qtype == "F16" else torch.bfloat16
            return np.asarray(torch.from_numpy(np.ascontiguousarray(value)).to(dtype).float().numpy())
        return value

    def _likely(self, values: Mapping[str, F32], layer: int) -> dict[str, str]:
        """What llama.cpp's naming makes of parameters' names, where the gguf package knows the architecture."""
        import gguf

        arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.model.dims.architecture), None)
        if arch is None:
            return {}
        names = gguf.get_tensor_name_map(arch, self.model.dims.n_layer)
        found = {}
        for path in values:
            name = names.get_name(f"model.layers.{layer}.{path}", try_suffixes=(".weight", ".bias"))
            if name:
                found[path] = name.removeprefix(f"blk.{layer}.")
        return found

    def _value_channels(self) -> NDArray[np.intp]:
        """Which value row each input of an output projection comes from."""
        dims = self.model.dims
        head, within = np.divmod(np.arange(dims.n_head * dims.head_dim_v), dims.head_dim_v)
        return np.asarray(head // max(1, dims.n_gqa) * dims.head_dim_v + within, np.intp)

    def _runner(self, layer: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        return lambda block, states: self.forward(block, layer, states.to(self.device))

    def _find_disk_names(self, layer: int, values: Mapping[str, F32], made_of: MadeOf) -> None:
        """What parameters are called on disk, and stacked experts one by one."""
        stored = self._checkpoint.on_disk(layer)
        for path in values:
            if path not in stored and stored:
                same = [
                    name for name, value in stored.items() if np.array_equal(_squeezed(value), _squeezed(values[path]))
                ]
                if len(same) == 1:
                    self._renamed[path] = same[0]
        for path, value in values.items():
            if value.ndim != 3 or path not in made_of:
                continue
            apart = path not in stored and path not in self._renamed
            names = names_on_disk(path, value, stored) if apart else ()
            found = (names, False) if names else linear_experts(path, value.shape[0], *made_of[path])
            if found is None:
                continue
            for own, end in ((path, ""), (f"{path}_bias", ".bias")):
                if own == path or own in values:
                    self._experts[own] = tuple(f"{name}{end}" for name in found[0])
                    self._in_turn.update({own} if found[1] else ())

    def _row(self) -> Layers:
        numbers = self._kind_of
        disk = self._checkpoint
        return Layers(
            self._skeleton.model_type,
            tuple(kind.row for kind in self._kinds),
            lambda _keys, layer: numbers[layer],
            experts=self._experts,
            in_turn=frozenset(self._in_turn),
            renamed=self._renamed,
            routers=tuple(dict.fromkeys(router for kind in self._kinds for router in kind.routers)),
            disk=DiskNames(
                disk.prefix,
                disk.top_name(f"{self._skeleton.path_of(self._skeleton.embedding)}.weight"),
                disk.top_name(f"{self._skeleton.norm_path}.weight"),
                disk.top_name(f"{self._skeleton.path_of(self._skeleton.head)}.weight"),
            ),
        )

    def kind(self, layer: int) -> LayerKind:
        """As ``LayeredModel``."""
        return self._kinds[self._kind_of[layer]].row

    def columns(self, layer: int, role: str) -> NDArray[np.int64] | None:
        """As ``LayeredModel``."""
        for parameter in self.kind(layer).parameters:
            if role in parameter.roles and isinstance(parameter.transform, ParameterLayout):
                return parameter.transform.parts[parameter.roles.index(role)].columns
        return None

    def first_of_each_kind(self) -> list[tuple[int, LayerKind]]:
        """As ``LayeredModel``."""
        first: dict[int, int] = {}
        for layer, number in self._kind_of.items():
            first.setdefault(number, layer)
        return [(layer, self._kinds[number].row) for number, layer in first.items()]

    def layer_names(self, layer: int) -> list[str]:
        """As ``LayeredModel``."""
        names = (layer_tensor(layer, role) for parameter in self.kind(layer).parameters for role in parameter.roles)
        return list(dict.fromkeys(name for name in names if name in self._names))

    def inputs(self, layer: int, block: nn.Module) -> list[SharedInput]:  # noqa: ARG002
        """As ``LayeredModel``."""
        return list(self.kind(layer).inputs)

    def entries(self, layer: int, block: nn.Module) -> list[Entry]:  # noqa: ARG002
        """As ``LayeredModel``; none where what a pass would skip leaves something for later layers."""
        carried = self._skeleton.carried
        leaves = carried is not None and any(layer in one.layers for one in carried.left)
        return [] if leaves else list(self._kinds[self._kind_of[layer]].entries)

    def shape(self, path: str, layer: int = 0) -> tuple[int, ...]:
        """As ``LayeredModel``."""
        return tuple(tensor_at(self._skeleton.blocks[layer], path).shape)

    def outline(self, layer: int) -> nn.Module:
        """As ``LayeredModel``."""
        return self._skeleton.copy_of(layer)

    def empty(self, layer: int) -> nn.Module:
        """As ``LayeredModel``."""
        return self._skeleton.copy_of(layer)

    def fill(self, block: nn.Module, layer: int, weights: Weights, paths: Collection[str]) -> None:  # noqa: ARG002
        """As ``LayeredModel``, but always all parameters: several may come of one tensor."""
        whole = self.layer(layer, weights)
        for path, value in whole.named_parameters():
            self._skeleton.fill(block, path, value.detach())
        for path, buffer in whole.named_buffers():
            owner, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(owner), leaf, buffer)

    def layer(self, layer: int, weights: Weights) -> nn.Module:
        """As ``LayeredModel``. The file's own weights are compared with the checkpoint's once.

        Raises:
            BadFile: a tensor is missing.
            BadInput: file and checkpoint differ.
        """
        if layer not in self._checked:
            self._check(layer)
        block = self._skeleton.copy_of(layer)
        kind = self._kinds[self._kind_of[layer]]
        for parameter in kind.row.parameters:
            value = self._made(layer, parameter, weights)
            self._skeleton.fill(block, parameter.path, torch.from_numpy(np.ascontiguousarray(value)))
        if kind.kept:
            held = self._checkpoint.layer(layer)
            for path in kind.kept:
                self._skeleton.fill(block, path, torch.from_numpy(held[path]))
        return block.to(self.device)

    def _made(self, layer: int, parameter: roles.Parameter, weights: Weights) -> F32:
        names = [layer_tensor(layer, role) for role in parameter.roles]
        missing = [name for name in names if name not in self._names]
        if missing:
            raise BadFile(
                f"The tensor '{missing[0]}' is missing.",
                means="The file is incomplete.",
                do="Convert the model again from its original checkpoint.",
            )
        return apply(parameter.transform, [weights(name) for name in names], 1)

    def _check(self, layer: int) -> None:
        """What the file gives is what the checkpoint holds; a layer that is put together in another way than others of
        its shapes is looked at by itself."""
        expected = self._checkpoint.layer(layer)
        for parameter in self.kind(layer).parameters:
            value = self._made(layer, parameter, self._source)
            if not self._alike(value, expected[parameter.path], layer_tensor(layer, parameter.roles[0])):
                self._kind_of[layer] = self._discovered(layer)
                self.family = self._row()
                break
        self._checked.add(layer)

    def _alike(self, value: F32, expected: F32, name: str) -> bool:
        """Whether a parameter is the checkpoint's as the file's type holds it; some values at a time."""
        own, wanted = value.reshape(-1), expected.reshape(-1)
        return len(own) == len(wanted) and all(
            np.allclose(own[at : at + _AT_ONCE], self._rounded(wanted[at : at + _AT_ONCE], name), rtol=1e-5, atol=1e-6)
            for at in range(0, len(own), _AT_ONCE)
        )

    def run(self, block: nn.Module, layer: int, states: torch.Tensor) -> torch.Tensor:
        """As ``LayeredModel``."""
        with inference():
            return self.forward(block, layer, states)

    def forward(self, block: nn.Module, layer: int, states: torch.Tensor) -> torch.Tensor:
        """As ``LayeredModel``."""
        windows, n = states.shape[:2]
        try:
            return self._skeleton.calls(windows, n, self.device)[layer](block, states)
        except LeavesMore as error:
            raise refused(
                self._skeleton.model_type, "its layers leave more for later ones than hidden states"
            ) from error

    def round_inputs(self, block: nn.Module, layer: int, qtype_of: QTypeOf) -> None:
        """As ``LayeredModel``."""
        round_inputs(block, self.kind(layer), layer, qtype_of)


def _named(layout: ParameterLayout) -> ParameterLayout | str:
    """A layout by the name that rows have for it, where there is one."""
    part = layout.parts[0]
    whole = len(layout.parts) == 1 and part.shape == layout.shape and not part.turned and not layout.turned
    if not whole or isinstance(layout, Reshaped) or part.columns is not None or layout.function == "minus_exp":
        return layout
    straight = np.array_equal(part.ours, part.theirs)
    return ("minus_one" if layout.function == "plus_one" else "same") if straight else layout


def _squeezed(value: F32) -> F32:
    return value.reshape([size for size in value.shape if size != 1])
