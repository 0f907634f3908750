"""transformers' own whole forward pass of a model: of a checkpoint, whose layers are loaded when the pass reaches them
and dropped behind it; or of a GGUF file, which transformers reads whole.

Nothing here knows how the walk calls layers, or how a GGUF file's tensors become parameters: it is what the walk is
compared with.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.errors import BitladderError, UnknownArchitecture
from bitladder.formats.blocks import QTYPES
from bitladder.progress import Progress
from bitladder.system import refer_to
from bitladder.walk.checkpoint_layers import CheckpointLayers, quiet_loading
from bitladder.walk.rounding import rounded_input
from bitladder.walk.skeleton import Skeleton, refused
from bitladder.walk.trace import Step, Trace, head_step, step
from bitladder.walk.whole import skeleton_of, text_config, usable

QTypeOf = Callable[[int], str]
"""The type that a layer's matrices are stored in, by its number; that of the head by the number of layers."""


class OwnForward:
    """A model of transformers that runs from token ids to logits."""

    def __init__(self, model: Any, blocks: Any, width: int) -> None:
        """``blocks``: its decoder layers."""
        self.model, self.blocks, self.width = model, blocks, width

    def load(self, layer: int) -> None:
        """Called before a layer is run: its weights must be there afterwards."""

    def drop(self, layer: int) -> None:
        """Called after a layer was run."""

    def trace(self, tokens: NDArray[np.int64], progress: Progress, *, last: int) -> Trace:
        """Its own pass over ids int64[windows, n].

        Raises:
            UnknownArchitecture: transformers cannot run it.
        """
        _, states, logits = self._run(tokens, {}, progress, None)
        return Trace(states, logits[:, -last:])

    def rounded_logits(
        self, tokens: NDArray[np.int64], progress: Progress, *, qtype_of: QTypeOf, last: int
    ) -> torch.Tensor:
        """f32[windows, last, n_vocab] of a pass that rounds what matrices of these types read."""
        return self._run(tokens, {}, progress, qtype_of)[2][:, -last:]

    def again(
        self, tokens: NDArray[np.int64], given: Trace, progress: Progress, *, qtype_of: QTypeOf, last: int
    ) -> list[Step]:
        """Its layers done again on another's states, with plain and with rounded inputs of matrices of these types."""
        before, exact, logits = self._run(tokens, given.states, progress, None)
        _, rounded, loose = self._run(tokens, given.states, progress, qtype_of)
        steps = []
        for layer, after in given.states.items():
            if layer in exact and given.shows(layer):
                steps.append(step(layer, before, after, exact[layer], rounded[layer]))
            before = after
        if steps and len(self.blocks) - 1 in given.states:
            steps.append(head_step(given.logits, logits[:, -last:], loose[:, -last:]))
        return steps

    def _run(
        self,
        tokens: NDArray[np.int64],
        instead: Mapping[int, torch.Tensor],
        progress: Progress,
        qtype_of: QTypeOf | None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor]:
        """What enters the first layer, what each layer gives, and all logits. ``instead``: states that are passed on in
        the place of what a layer gives."""
        entered: list[torch.Tensor] = []
        states: dict[int, torch.Tensor] = {}

        def before(layer: int) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
                progress("transformers: its own forward pass", layer, len(self.blocks))
                self.load(layer)
                hidden = arguments[0] if arguments else options.get("hidden_states")
                if layer == 0 and isinstance(hidden, torch.Tensor):
                    entered.append(hidden)

            return hook

        def behind(layer: int) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, out: Any) -> Any:
                self.drop(layer)
                hidden = out if isinstance(out, torch.Tensor) else out[0]
                if tuple(hidden.shape) != (*tokens.shape, self.width):  # several streams of states
                    return None
                states[layer] = hidden
                if layer not in instead:
                    return None
                return instead[layer] if isinstance(out, torch.Tensor) else (instead[layer], *out[1:])

            return hook

        with ExitStack() as hooks, torch.no_grad():
            for layer, block in enumerate(self.blocks):
                hooks.callback(block.register_forward_pre_hook(before(layer), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(behind(layer)).remove)
            for layer, part in enumerate([*self.blocks, self.model.get_output_embeddings()] if qtype_of else ()):
                for module in part.modules():
                    if qtype_of and isinstance(module, nn.Linear):
                        hooks.callback(module.register_forward_pre_hook(_rounding(qtype_of(layer))).remove)
            try:
                logits = self.model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float()
            except (
                RuntimeError,
                ValueError,
                KeyError,
                IndexError,
                TypeError,
                AttributeError,
                NotImplementedError,
            ) as error:
                words = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                raise refused(type(self.model).__name__, f"transformers cannot run it ({words})") from error
        progress("transformers: its own forward pass", len(self.blocks), len(self.blocks))
        return entered[0] if entered else torch.empty(0), states, logits


def _rounding(qtype: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> Any:
        x = arguments[0]
        if x.shape[-1] % QTYPES[qtype].block_size:
            return None
        return (rounded_input(x, qtype), *arguments[1:])

    return hook


class CheckpointForward(OwnForward):
    """Of a checkpoint folder: configuration and weights alone, no code. Memory: embedding, head and one layer, in
    32-bit floats.

    Raises:
        UnknownArchitecture: transformers does not know the class, or its layers cannot be loaded one by one.
        BadFile, BadInput: the folder is no sound checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._skeleton = skeleton = skeleton_of(text_config(folder))
        self._checkpoint = CheckpointLayers(folder, skeleton)
        super().__init__(skeleton.model, skeleton.blocks, int(skeleton.config.hidden_size))
        embedding, head = (f"{skeleton.path_of(one)}.weight" for one in (skeleton.embedding, skeleton.head))
        tied = bool(getattr(skeleton.config, "tie_word_embeddings", False))
        wanted = {path: value for path, value in skeleton.top_parameters().items() if not (tied and path == head)}
        for path, value in self._checkpoint.top(wanted).items():
            skeleton.fill(skeleton.model, path, torch.from_numpy(value))
            if tied and path == embedding:
                skeleton.head.weight = skeleton.embedding.weight

    def load(self, layer: int) -> None:
        """Fill a layer."""
        for path, value in self._checkpoint.layer(layer).items():
            self._skeleton.fill(self.blocks[layer], path, torch.from_numpy(value))

    def drop(self, layer: int) -> None:
        """Empty it again."""
        for path, value in self._skeleton.layer_parameters(layer).items():
            self._skeleton.fill(self.blocks[layer], path, torch.empty_like(value, device="meta"))


class GgufForward(OwnForward):
    """Of a GGUF file of one part, decoded by transformers to 32-bit floats, all of it in memory.

    Raises:
        UnknownArchitecture: transformers does not read it.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoConfig, modeling_gguf_pytorch_utils

        # what lies beside a file is not read, and a bar for each tensor says nothing
        with TemporaryDirectory(prefix="bitladder-") as alone, quiet_loading(), redirect_stderr(io.StringIO()):
            file = Path(alone) / "model.gguf"
            refer_to(path.resolve(), file)
            try:
                config = AutoConfig.from_pretrained(
                    alone, gguf_file=file.name, local_files_only=True, trust_remote_code=False
                ).get_text_config(decoder=True)
                skeleton = skeleton_of(usable(config))
                reader: Any = modeling_gguf_pytorch_utils
                parsed = reader.load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=skeleton.model)
                found = parsed["tensors"]
            except BitladderError:
                raise
            except Exception as error:  # whatever its reader raises on a file that it does not know
                words = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                raise UnknownArchitecture(f"transformers does not read this GGUF file ({words}).") from error
        for name, expected in skeleton.model.state_dict().items():
            value = found.get(name, found.get(_embedding_for(name, skeleton)))
            if value is None or value.shape != expected.shape:
                raise UnknownArchitecture(f"transformers' reader of GGUF files finds no '{name[-80:]}' in this one.")
            skeleton.fill(skeleton.model, name, value.float())
        super().__init__(skeleton.model, skeleton.blocks, int(skeleton.config.hidden_size))


def _embedding_for(name: str, skeleton: Skeleton) -> str:
    """The embedding, where a head that has no weights of its own is asked for."""
    tied = bool(getattr(skeleton.config, "tie_word_embeddings", False))
    is_head = name == f"{skeleton.path_of(skeleton.head)}.weight"
    return f"{skeleton.path_of(skeleton.embedding)}.weight" if tied and is_head else ""
