"""The parameters of a model's layers from its checkpoint, as transformers itself would load them, one layer at a time.

Tensors on disk have other names than modules have parameters, experts lie there one by one, some are fused in one place
and apart in the other: transformers' own conversion does all that, here on the tensors of one layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitladder.errors import BadFile
from bitladder.files.checkpoint import Checkpoint, read_checkpoint
from bitladder.files.decoded import FloatView
from bitladder.files.safetensors_writer import PiecewiseTensor
from bitladder.walk.skeleton import Skeleton, refused

F32 = NDArray[np.float32]
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointLayers:
    """A checkpoint folder beside a skeleton of its text model."""

    def __init__(self, folder: Path, skeleton: Skeleton) -> None:
        """Raises BadFile or BadInput where the folder is no sound checkpoint, UnknownArchitecture where its tensors are
        not those of transformers' model."""
        self.checkpoint: Checkpoint = read_checkpoint(folder)
        self._view = FloatView(self.checkpoint)
        self._skeleton = skeleton
        self._names = [tensor.name for tensor in self._view.tensors]
        self.prefix = self._prefix()
        own = re.compile(re.escape(self.prefix) + r"(\d+)\.")
        self._by_layer: dict[int, list[str]] = {}
        self._top: list[str] = []
        for name in self._names:
            if found := own.match(name):
                self._by_layer.setdefault(int(found[1]), []).append(name)
            else:
                self._top.append(name)

    def _prefix(self) -> str:
        """What names of decoder layers begin with: of lists that are called like transformers', the one that holds what
        a layer of transformers' does."""
        own = self._skeleton.layers_path
        wanted = {path for layer in (0, self._skeleton.n_layer - 1) for path in self._skeleton.layer_parameters(layer)}
        found: dict[str, int] = {}
        numbered = re.compile(rf"(?:^|\.)(\w+)\.(?:0|{self._skeleton.n_layer - 1})\.")
        for name in self._names:
            for at in numbered.finditer(name):
                prefix = name[: at.end(1)] + "."
                fits = (at[1] == own.rpartition(".")[2]) + 2 * (name[at.end() :] in wanted)
                found[prefix] = found.get(prefix, 0) + fits
        best = max(found, key=lambda one: found[one], default="")
        if not best or not found[best]:
            raise refused(self._skeleton.model_type, "its checkpoint has no tensors that are called like its layers")
        return best

    def disk_names(self, layer: int) -> list[str]:
        """The tensors of a layer, as they are called on disk."""
        return self._by_layer.get(layer, [])

    def on_disk(self, layer: int) -> dict[str, F32]:
        """The tensors of a layer as they are stored, f32, by their names after the layer's prefix."""
        start = len(f"{self.prefix}{layer}.")
        return {name[start:]: _f32(value) for name, value in self._read(self.disk_names(layer)).items()}

    def layer(self, layer: int) -> dict[str, F32]:
        """Parameters and stored buffers of a layer, f32, by path in it.

        Raises:
            UnknownArchitecture: some are not there.
        """
        skeleton = self._skeleton
        own = f"{skeleton.layers_path}.{layer}."
        wanted = skeleton.layer_parameters(layer)
        found = self._loaded(self.disk_names(layer), {f"{own}{path}" for path in wanted})
        return {path: found[f"{own}{path}"] for path in wanted}

    def top(self, wanted: Mapping[str, torch.Tensor]) -> dict[str, F32]:
        """What lies outside the layers, f32, by path in the whole model, embedding and head among ``wanted`` only where
        they are asked for."""
        around = self._skeleton.layers_path.rpartition(".")[0]
        outside = self.prefix.removesuffix(".").rpartition(".")[0]
        leaves = {path.removeprefix(f"{around}.") for path in wanted} | set(wanted)
        names = [name for name in self._top if name in leaves or name.removeprefix(f"{outside}.") in leaves]
        return self._loaded(names, set(wanted))

    def others(self, used: Collection[str]) -> list[PiecewiseTensor]:
        """What belongs neither to a layer nor to ``used`` names on disk, as it is stored (in floats where that is
        quantized): towers that see or hear, heads that predict several tokens."""
        layers = {name for layer in range(self._skeleton.n_layer) for name in self.disk_names(layer)}

        def pieces(name: str, dtype: str) -> list[memoryview]:
            stored = self._read([name])[name]
            stored = stored.to(_TORCH.get(dtype, stored.dtype))
            return [stored.contiguous().reshape(-1).view(torch.uint8).numpy().data]

        return [
            PiecewiseTensor(tensor.name, tensor.dtype, tensor.shape, partial(pieces, tensor.name, tensor.dtype))
            for tensor in self._view.tensors
            if tensor.name not in layers and tensor.name not in used
        ]

    def rows(self, path: str, some: NDArray[np.int64]) -> F32:
        """Some rows f32[rows, columns] of a table outside the layers."""
        name = self.top_name(path)
        if name not in self._names:
            raise refused(self._skeleton.model_type, f"its checkpoint lacks '{path[-60:]}'")
        return _f32(self._read([name])[name][torch.from_numpy(some)])

    def top_name(self, path: str) -> str:
        """What a parameter outside the layers is called on disk; its path where that is not known."""
        around, outside = self._skeleton.layers_path.rpartition(".")[0], self.prefix[:-1].rpartition(".")[0]
        leaf = path.removeprefix(f"{around}.")
        likely = (f"{outside}.{leaf}", f"{outside.rpartition('.')[0]}.{leaf}", path)
        return next((name.removeprefix(".") for name in likely if name.removeprefix(".") in self._names), path)

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError, safe_open

        shards: dict[str, Path] = {shard.name: shard for shard in self.checkpoint.shards}
        opened: dict[str, Any] = {}
        values: dict[str, torch.Tensor] = {}
        with ExitStack() as files:
            for name in names:
                if (own := self._view.decoded(name)) is not None:
                    values[name] = torch.from_numpy(own)
                    continue
                shard = self.checkpoint.shard_of[name]
                try:
                    if shard not in opened:
                        opened[shard] = files.enter_context(safe_open(shards[shard], "pt"))
                    values[name] = opened[shard].get_tensor(name)
                except (SafetensorError, OSError) as error:
                    raise BadFile(
                        f"{shards[shard]}: the tensor '{name}' cannot be read: {str(error)[:120]}.",
                        do="Fetch the file again.",
                    ) from error
        return values

    def _loaded(self, names: list[str], wanted: set[str]) -> dict[str, F32]:
        """Parameters by their paths in the model, converted by transformers; the model stays without weights."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        skeleton = self._skeleton
        around, outside = skeleton.layers_path.rpartition(".")[0], self.prefix[:-1].rpartition(".")[0]
        read = {}
        for name, value in self._read(names).items():
            inside = bool(outside) and name.startswith(f"{outside}.")
            read[f"{around}.{name.removeprefix(f'{outside}.')}" if inside or not outside else name] = value
        mapping: Any = get_model_conversion_mapping(skeleton.model)
        settings = LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping, ignore_mismatched_sizes=True)
        empty = {path: value for path, value in skeleton.model.state_dict().items() if path in wanted}
        try:
            with torch.inference_mode(False), torch.no_grad(), quiet_loading():
                convert_and_load_state_dict_in_model(skeleton.model, read, settings)
            loaded = skeleton.model.state_dict()
            found = {path: _f32(loaded[path]) for path in wanted if not loaded[path].is_meta}
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            why = f"transformers cannot load its checkpoint ({type(error).__name__}: {str(error)[:100]})"
            raise refused(skeleton.model_type, why) from error
        finally:
            for path, value in empty.items():
                if value.is_meta:
                    skeleton.fill(skeleton.model, path, value)
        missing = sorted(path for path in wanted if path not in found)
        if missing:
            raise refused(skeleton.model_type, f"its checkpoint lacks '{missing[0][-60:]}'")
        return found


def _f32(value: torch.Tensor) -> F32:
    return np.asarray(value.detach().to(torch.float32).contiguous().numpy(), np.float32)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bar of transformers' own while it loads a layer."""
    from transformers.utils import logging

    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
