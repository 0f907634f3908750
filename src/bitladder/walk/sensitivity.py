"""How much an error in each weight matrix disturbs the model's predictions: one pass forward, one back.

To second order, replacing a matrix W by W + D raises the KL divergence of the predictions from the source's by half of

    sum over tokens of E[(g^T D x)^2]

where x is what the matrix reads, and g the gradient of log p(y) with respect to what it writes, for labels y drawn from
the source's own predictions (the Fisher information; Martens 2014, arXiv:1412.1193). With x and g taken as independent
and the rows of g as uncorrelated (the Kronecker factors of K-FAC, Martens and Grosse 2015, arXiv:1503.05671, one of
them a diagonal), that is a sum over rows r of

    G_r (D_r H D_r^T) / T,      H = X^T X,   G_r = sum of g_r^2,   T tokens

so a matrix's sensitivities are its Hessian and one number per row. States of all layers are kept, on disk when they
outgrow memory, and gradients travel back through one layer of weights at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.formats.roles import Parameter, SharedInput, layer_tensor
from bitladder.progress import Progress
from bitladder.walk.calibration import InputStatistics, Sums, vectors
from bitladder.walk.layers import LayeredModel, Weights
from bitladder.walk.products import products
from bitladder.walk.states import Batch, Shelf
from bitladder.walk.transforms import permute

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_SLICE = 8192
_SEED = 20240229


@dataclass(frozen=True)
class Sensitivity:
    """What errors of one tensor cost: ``inputs`` per matrix, ``rows`` f64[matrices, rows] the Fisher weights G.

    The predicted rise of KL per predicted token, for errors D of matrix e, is half the sum over its rows of
    ``rows[e, r] * (D_r H_e D_r^T) / inputs[e].tokens / predictions``.
    """

    name: str
    inputs: tuple[InputStatistics, ...]
    rows: F64
    predictions: int


@dataclass(frozen=True)
class EmbeddingSensitivity:
    """What errors of the embedding's rows cost: half of ``sum_ij weights[i, j] D[tokens[i], j]^2 / predictions``."""

    tokens: NDArray[np.int64]
    weights: F64
    predictions: int


class SensitivityPass:
    """The pass over a model; ``windows`` as laid out in ``batches``. Results are handed to ``take`` as they come, so
    that only one layer's Hessians exist at a time."""

    def __init__(
        self, model: LayeredModel, weights: Weights, batches: Sequence[Batch], shelf: Shelf, *, half: bool = False
    ) -> None:
        """``shelf`` gives room for one set of states per layer and two more. ``half``: multiply in bfloat16."""
        self.model, self._weights, self._batches, self._shelf, self._half = model, weights, batches, shelf, half
        self.predictions = sum(length - 1 for batch in batches for length in batch.lengths)
        self._random = torch.Generator(device="cpu").manual_seed(_SEED)

    def run(self, take: Callable[[Sensitivity | EmbeddingSensitivity], None], progress: Progress) -> None:
        """Hand every tensor's sensitivity to ``take``, the output matrix's first, the embedding's last."""
        n_layer = self.model.n_layer
        total = 4.0 * n_layer + 4
        entering = [self._shelf.take()]
        for batch in self._batches:
            entering[0].put(batch, self.model.embed(batch.tokens, self._weights))
        for layer in range(n_layer):
            progress(f"sensitivity: layer {layer + 1} of {n_layer}", layer, total)
            entering.append(self._shelf.take())
            block = self.model.layer(layer, self._weights)
            for batch in self._batches:
                with products(half=self._half):
                    out = self.model.run(block, layer, entering[-2].get(batch).to(self.model.device))
                entering[-1].put(batch, out)
        gradients = entering.pop()  # what enters the head is replaced by the gradient there
        progress("sensitivity: the head", n_layer, total)
        take(self._head(gradients))
        for layer in reversed(range(n_layer)):
            progress(f"sensitivity: back through layer {layer + 1} of {n_layer}", 4.0 * n_layer - 3 * layer, total)
            states = entering.pop()
            for found in self._layer(layer, states, gradients):
                take(found)
            self._shelf.give_back(states)
        take(self._embedding(gradients))
        progress("sensitivity", total, total)

    def _head(self, states: Any) -> Sensitivity:
        """The output matrix's sensitivity; ``states`` become the gradient of the summed log-likelihood there."""
        norm = self.model.norm(self._weights)
        n_vocab = self.model.model.dims.n_vocab
        rows = np.zeros(n_vocab)
        sums = Sums(self.model.model.dims.n_embd, self.model.device, gram=True)
        for batch in self._batches:
            predicting = _predicting(batch).to(self.model.device)
            with torch.enable_grad():
                x = states.get(batch).to(self.model.device).clone().requires_grad_()
                normed = norm(x)
            with torch.no_grad(), products(half=self._half):
                own = normed.detach()[predicting]
                sums.add(own)
                gradient = torch.zeros_like(normed)
                gradient[predicting] = self._through_vocabulary(own, rows)
            torch.autograd.backward(normed, gradient)
            states.put(batch, x.grad)
        seen = sums.result()
        # p (1 - p) is the exact expectation of the squared gradient of a logit
        return Sensitivity(self.model.output, (seen,), rows[None], self.predictions)

    def _through_vocabulary(self, normed: torch.Tensor, rows: F64) -> torch.Tensor:
        """Gradient of log p(y) at normed states f32[tokens, n_embd], y drawn from p; adds p (1 - p) to ``rows``.

        The vocabulary is taken in slices twice: for the normaliser, then for the draw (where the running sum of p
        passes a uniform number) and the sums.
        """
        peak = torch.full((len(normed),), -torch.inf, device=normed.device)
        total = torch.zeros(len(normed), dtype=torch.float64, device=normed.device)
        for _, logits, _, _ in self._logits(normed):
            higher = torch.maximum(peak, logits.max(dim=1).values)
            total = total * torch.exp((peak - higher).double()) + (logits - higher[:, None]).exp().sum(1).double()
            peak = higher
        log_z = peak + total.log().float()
        # what is left of a uniform number once the slices before are subtracted; below what rounding leaves of 1
        left = torch.rand(len(normed), generator=self._random).to(normed.device) * (1 - 1e-4)
        gradient = torch.zeros_like(normed)
        for first, logits, slope, weight in self._logits(normed):
            p = torch.exp(logits - log_z[:, None])
            spread = p * (1 - p) if slope is None else p * (1 - p) * slope * slope
            rows[first : first + p.shape[1]] += spread.sum(0).double().cpu().numpy()
            here = p.sum(1)
            drawn = torch.nonzero((left >= 0) & (left < here)).flatten()
            at = torch.searchsorted(p[drawn].cumsum(1), left[drawn, None]).flatten().clamp(max=p.shape[1] - 1)
            left -= here  # negative from here on for those that are drawn
            p.neg_()
            p[drawn, at] += 1
            gradient += (p if slope is None else p * slope) @ weight
        return gradient

    def _logits(self, normed: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Slices of the vocabulary: first row, logits, their slope under a soft cap, the weights."""
        n_vocab, cap = self.model.model.dims.n_vocab, self.model.logit_softcap
        for first in range(0, n_vocab, _SLICE):
            rows = self._weights(self.model.output, slice(first, min(first + _SLICE, n_vocab)))
            weight = torch.from_numpy(rows).to(normed.device)
            logits = nn.functional.linear(normed, weight)
            if cap:
                bent = torch.tanh(logits / cap)
                yield first, bent * cap, 1 - bent * bent, weight
            else:
                yield first, logits, None, weight

    def _layer(self, layer: int, states: Any, gradients: Any) -> Iterator[Sensitivity]:
        """Sensitivities of a layer's tensors; ``gradients`` at its output become those at its input."""
        block = self.model.layer(layer, self._weights)
        present = {name for name, _ in block.named_modules()}
        inputs = [shared for shared in self.model.kind(layer).inputs if shared.module in present]
        watch = _Watch(self.model, block, inputs, half=self._half)
        for batch in self._batches:
            valid = torch.from_numpy(batch.valid).to(self.model.device)
            gradient = gradients.get(batch).to(self.model.device)
            with watch.on(valid.reshape(-1)), torch.enable_grad(), products(half=self._half):
                x = states.get(batch).to(self.model.device).clone().requires_grad_()
                out = self.model.forward(block, layer, x)
                torch.autograd.backward(out, torch.where(valid[..., None], gradient, 0))
            gradients.put(batch, x.grad)
        held = set(self.model.layer_names(layer))
        for shared in inputs:
            seen = tuple(one.result() for one in watch.sums[shared])
            for parameter in self.model.kind(layer).parameters:
                for role, energies in self._by_role(block, parameter, watch.energies, len(seen)):
                    if role in shared.roles and layer_tensor(layer, role) in held:
                        yield Sensitivity(layer_tensor(layer, role), seen, energies, self.predictions)

    def _by_role(
        self, block: nn.Module, parameter: Parameter, energies: dict[str, torch.Tensor], matrices: int
    ) -> Iterator[tuple[str, F64]]:
        """Row weights f64[matrices, rows] of each GGUF tensor that a parameter is made of."""
        module, _, leaf = parameter.path.rpartition(".")
        if leaf == "bias" or module not in energies:
            return
        whole = energies[module].cpu().numpy()
        if leaf != "weight":  # fused experts: only what all of them wrote together has a gradient of its own
            rows = block.get_parameter(parameter.path).shape[-2] // len(parameter.roles)
            each = whole if len(whole) == rows else np.full(rows, whole.mean())
            yield from ((role, np.tile(each, (matrices, 1))) for role in parameter.roles)
            return
        if parameter.transform == "unpermute":
            heads = self.model.model.dims.n_head if "q_proj" in module else self.model.model.dims.n_head_kv
            whole = permute(whole.astype(np.float32), heads).astype(np.float64)
        for role, part in zip(parameter.roles, np.split(whole, len(parameter.roles)), strict=True):
            yield role, np.tile(part, (matrices, 1))

    def _embedding(self, gradients: Any) -> EmbeddingSensitivity:
        """Squared gradients at the embeddings, summed over the places where each token occurs."""
        scale = self.model.config.hidden_size if self.model.family.scaled_embedding else 1
        ids = np.concatenate([batch.tokens[batch.valid] for batch in self._batches])
        squares = np.concatenate(
            [gradients.get(batch).cpu().numpy()[batch.valid].astype(np.float64) ** 2 for batch in self._batches]
        )
        tokens, where = np.unique(ids, return_inverse=True)
        weights = np.zeros((len(tokens), squares.shape[1]))
        np.add.at(weights, where, squares * scale)
        return EmbeddingSensitivity(tokens, weights, self.predictions)


def _predicting(batch: Batch) -> torch.Tensor:
    """bool[windows, n]: positions whose next token exists."""
    lengths = np.asarray(batch.lengths)[:, None]
    return torch.from_numpy(np.arange(batch.tokens.shape[1])[None] < lengths - 1)


class _Watch:
    """Hooks on a layer: Gram matrices of what is read, sums of squared gradients of what is written."""

    def __init__(self, model: LayeredModel, block: nn.Module, inputs: Sequence[SharedInput], *, half: bool) -> None:
        self.block, self.inputs, self._half = block, inputs, half
        self.sums: dict[SharedInput, list[Sums]] = {shared: [] for shared in inputs}
        self.energies: dict[str, torch.Tensor] = {}
        reads = {role for shared in inputs for role in shared.roles}
        present = {name for name, _ in block.named_modules()}
        owners = [p.path.rpartition(".")[0] for p in model.family.parameters if reads & set(p.roles)]
        self._writers = [name for name in dict.fromkeys(owners) if name in present]

    def on(self, valid: torch.Tensor) -> ExitStack:
        """Watch one batch; ``valid`` says which of its positions hold a token."""
        stack = ExitStack()
        for shared in self.inputs:
            hook = self._reading(shared, valid)
            stack.callback(self.block.get_submodule(shared.module).register_forward_pre_hook(hook).remove)
        for name in self._writers:
            stack.callback(self.block.get_submodule(name).register_forward_hook(self._writing(name)).remove)
        return stack

    def _reading(self, shared: SharedInput, valid: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            with torch.no_grad():
                detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
                for number, x in enumerate(vectors(shared.kind, module, detached, valid)):
                    if number == len(self.sums[shared]):
                        self.sums[shared].append(Sums(x.shape[1], x.device, gram=True, half=self._half))
                    self.sums[shared][number].add(x)

        return seen

    def _writing(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def arrived(gradient: torch.Tensor) -> None:
            squares = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0)
            self.energies[name] = self.energies.get(name, 0) + squares

        def seen(_: nn.Module, __: Any, out: Any) -> None:
            (out if isinstance(out, torch.Tensor) else out[0]).register_hook(arrived)

        return seen
