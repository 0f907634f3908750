"""How much an error in each weight matrix disturbs the model's predictions: one pass forward, one back.

To second order, replacing a matrix W by W + D raises the KL divergence of the predictions from the source's by half of

    sum over tokens of E[(g^T D x)^2]

where x is what the matrix reads, and g the gradient of log p(y) with respect to what it writes, for labels y drawn from
the source's own predictions (the Fisher information; Martens 2014, arXiv:1412.1193). With x and g taken as independent
and the rows of g as uncorrelated (the Kronecker factors of K-FAC, Martens and Grosse 2015, arXiv:1503.05671, one of
them a diagonal), that is a sum over rows r of

    G_r (D_r H D_r^T) / T,      H = X^T X,   G_r = sum of g_r^2,   T tokens

so a matrix's sensitivities are its Hessian and one number per row. Beyond that, gradients tell which errors cost little
together: of the rows of a head of queries or keys (``HeadCurvature``), of the embedding's channels
(``EmbeddingSensitivity``). States of all layers are kept, on disk when they outgrow memory, and gradients travel back
through one layer of weights at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitladder.describe.windows import Window
from bitladder.formats.roles import EMBEDDING, Parameter, layer_tensor
from bitladder.kernels import gptq
from bitladder.progress import Part, Progress
from bitladder.stats.bootstrap import SEED
from bitladder.walk.driver import Builder, Member, MemberGroup, Resumable, Stream, backward, forward
from bitladder.walk.gradients import send_back
from bitladder.walk.head import softcapped
from bitladder.walk.inputs import InputStatistics, InputWatch, Sums, Wants, merged
from bitladder.walk.keep import Arrays, Keep
from bitladder.walk.layers import LayeredModel, tensor_at
from bitladder.walk.products import products
from bitladder.walk.states import Batch, States, batches_of
from bitladder.walk.transforms import permute
from bitladder.walk.weights import LevelWeights

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_SLICE = 8192
HEADS = ("attn_q.weight", "attn_k.weight")
"""Tensors whose errors are weighed by head."""
_DAMP = 0.01
"""Of the mean diagonal, added to what errors of a head's rows cost together."""


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
    """What errors of the embedding's rows cost: half of ``sum_ij weights[i, j] D[tokens[i], j]^2 / predictions``.

    ``curvature`` f64[n_embd, n_embd] knows of channels together what ``weights`` knows of each: the mean of ``g g^T``
    over all places where a token stands, g the gradient at its row.
    ``counts`` i64[tokens]: how many of these places each token has.
    """

    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]
    weights: F64
    predictions: int
    curvature: F64


@dataclass(frozen=True)
class HeadCurvature:
    """What errors of the rows of each head of queries or keys cost together.

    ``blocks`` f32[heads, d, d]: the mean of ``g g^T`` with g the gradients at what d rows write, shrunk towards its
    diagonal (``gptq.shrink``) and damped. Attention looks at few directions of a head, so errors of its rows that
    cancel there cost little. The first token of a window is left out: attention sinks to it, its gradients are larger
    than all others together, and the one vector that it is says nothing of other inputs.
    """

    name: str
    blocks: F32
    first: float
    """The share of squared gradients that those first tokens have."""


@dataclass(frozen=True)
class Curvatures:
    """What gradients say of errors beyond a number per row: of the embedding (``embedding_curvature``), and of the
    heads of queries and keys by tensor (``HeadCurvature.blocks``)."""

    embedding: F64
    heads: Mapping[str, F32]


def embedding_curvature(head: Sensitivity, embedding: EmbeddingSensitivity) -> F64:
    """The Hessian f64[n_embd, n_embd] that codes of the embedding are fitted under, in the place of the mean of
    ``x x^T`` of other matrices; where it is the output matrix, too, what is added to that of its inputs.

    As output row t costs the mean of ``p_t (1 - p_t) (D_t x)^2``; as embedding ``(D_t g)^2`` as often as t occurs,
    which is the mean of p_t. So rows of all frequencies weigh both alike: ``E[x x^T]`` and ``E[g g^T] / s``, with s
    the sum over t of the mean of ``p_t (1 - p_t)``. ``E[g g^T]`` is shrunk towards its diagonal (``gptq.shrink``);
    zeros where gradients are not finite, which say nothing.
    """
    curvature = embedding.curvature.copy()
    gptq.shrink(curvature, int(embedding.counts.sum()))
    if head.name == EMBEDDING:
        curvature /= float(head.rows.sum()) / head.predictions
    return curvature if np.isfinite(curvature).all() else np.zeros_like(curvature)


Take = Callable[[Sensitivity | EmbeddingSensitivity | HeadCurvature], None]


class _Back(Builder):
    """Gradients go back through a layer, and of it heads alone are asked."""

    def __init__(self, model: LayeredModel, weights: LevelWeights, there: Stream, take: Take) -> None:
        super().__init__(weights)
        self.model, self._there, self._take = model, there, take

    def build(self, stream: Stream, layer: int, states: States) -> None:
        """As ``Builder``."""
        block = self.load(self.model, layer)
        entered = self._there.entered.pop()
        shards = []
        for shard in stream.shards:
            heads = _Heads(self.model, layer, block)
            for batch in shard:
                with heads.on(block, batch):
                    send_back(self.model, block, layer, batch, entered, states, half=stream.half)
            shards.append(heads)
        self._there.shelf.give_back(entered)
        _summed_heads(shards, self._take)


class _Slice(NamedTuple):
    """Some rows of the vocabulary, at all states."""

    first: int
    """The first row's number."""
    logits: torch.Tensor
    slope: torch.Tensor | None
    """The logits' under a soft cap."""
    weight: torch.Tensor


class SensitivityPass:
    """The two sweeps over a model. Results are handed to ``take`` as they come, so that only one layer's Hessians exist
    at a time."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        batches: Sequence[Batch],
        *,
        state_bytes: int,
        spill: Path | None = None,
        half: bool = False,
        keep: Keep | None = None,
        results: Resumable | None = None,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        """
        Args:
            model: whose layers they are.
            weights: the source's.
            batches: the text.
            state_bytes: states of all layers are held, those beyond this in files in ``spill``.
            spill: a folder; the system's for temporary files by default.
            half: multiply in bfloat16.
            keep: what makes a killed way back go on; the way there is done again as far as it is needed.
            results: keeps what ``take`` was handed, of layers that are not done again.
            held_out: windows whose part of Hessians is known apart, as of ``Wants``.
        """
        self.model, self._weights, self._batches, self._half = model, weights, batches, half
        self._state_bytes, self._spill = state_bytes, spill
        self._keep, self._results, self._held_out = keep, results or Resumable(), held_out
        self.predictions = predictions_of(batches)
        self._random = torch.Generator(device="cpu").manual_seed(SEED)

    def run(self, take: Take, progress: Progress) -> None:
        """Hand every tensor's sensitivity to ``take``, the output matrix's first, the embedding's last, curvatures of
        heads before the matrices of their layer.

        Raises:
            BadFile, BadWeights: weights cannot be read, or are not finite.
            OutputError: no room for states.
        """
        n_layer = self.model.n_layer
        total = 4.0 * n_layer + 4
        tokens = sum(batch.tokens.size for batch in self._batches)
        kept = self._keep.load(tokens, self.model.width) if self._keep else None
        there = self._stream(Member(self._weights), remember=True)
        forward([there], Part(progress, 0, n_layer, total), "sensitivity: ", stop=kept.layer if kept else None)
        gradients = there.states_of(0)  # what enters the head is replaced by the gradient there
        back = self._stream(self._gradients(there, take), back=True)
        back.groups = [MemberGroup([0], gradients)]
        if kept:
            back.layer = kept.layer
            kept.restore(0, gradients)
            self._results.resume(kept.layer, kept.of(0))
        else:
            progress("sensitivity: the head", n_layer, total)
            take(self._head(gradients))
        backward(back, Part(progress, 4.0 * n_layer, n_layer, total), "sensitivity: back through ")
        take(self._embedding(gradients))
        back.finished()
        progress("sensitivity", total, total)

    def _gradients(self, there: Stream, take: Take) -> Builder:
        return Gradients(self.model, self._weights, there, take, self._results, held_out=self._held_out)

    def _stream(self, member: Member, *, remember: bool = False, back: bool = False) -> Stream:
        return Stream(
            self.model,
            [member],
            self._batches,
            state_bytes=self._state_bytes,
            spill=self._spill,
            half=self._half,
            keep=self._keep if back else None,
            remember=remember,
            back=back,
        )

    def _head(self, states: States) -> Sensitivity:
        """The output matrix's sensitivity; ``states`` become the gradient of the summed log-likelihood there."""
        norm = self.model.norm(self._weights)
        n_vocab = self.model.model.dims.n_vocab
        rows = np.zeros(n_vocab)
        sums = Sums(self.model.model.dims.n_embd, self.model.device, gram=True, largest=False)
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
            states.put(batch, cast(torch.Tensor, x.grad))
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
        for logits in (piece.logits for piece in self._logits(normed)):
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

    def _logits(self, normed: torch.Tensor) -> Iterator[_Slice]:
        """The vocabulary in slices."""
        n_vocab, cap = self.model.model.dims.n_vocab, self.model.logit_softcap
        for first in range(0, n_vocab, _SLICE):
            some = slice(first, min(first + _SLICE, n_vocab))
            weight = torch.from_numpy(self._weights(self.model.output, some)).to(normed.device)
            bias = None if self.model.head_bias is None else torch.from_numpy(self.model.head_bias[some]).to(weight)
            logits = nn.functional.linear(normed, weight, bias)
            logits = softcapped(logits, cap)
            yield _Slice(first, logits, 1 - (logits / cap).square() if cap else None, weight)

    def _embedding(self, gradients: States) -> EmbeddingSensitivity:
        """Squared gradients at the embeddings, summed over the places where each token occurs."""
        scale = self.model.embedding_energy
        ids = np.concatenate([batch.tokens[batch.valid] for batch in self._batches])
        slopes = np.concatenate(
            [gradients.get(batch).cpu().numpy()[batch.valid].astype(np.float64) for batch in self._batches]
        )[:, : self.model.model.dims.n_embd]
        tokens, where, counts = np.unique(ids, return_inverse=True, return_counts=True)
        weights = np.zeros((len(tokens), slopes.shape[1]))
        np.add.at(weights, where, slopes**2 * scale)
        curvature = slopes.T @ slopes * (scale / len(ids))
        return EmbeddingSensitivity(tokens, counts, weights, self.predictions, curvature)


class CurvaturePass(SensitivityPass):
    """The same for the output matrix, the embedding and the heads of attention alone."""

    def _gradients(self, there: Stream, take: Take) -> Builder:
        return _Back(self.model, self._weights, there, take)


def curvatures_of(
    model: LayeredModel,
    weights: LevelWeights,
    windows: Sequence[Window],
    *,
    state_bytes: int,
    spill: Path,
    half: bool,
    progress: Progress,
) -> Curvatures:
    """Curvatures from gradients on windows; arguments and errors as of ``SensitivityPass``."""
    found: list[Sensitivity | EmbeddingSensitivity | HeadCurvature] = []
    passes = CurvaturePass(model, weights, batches_of(windows), state_bytes=state_bytes, spill=spill, half=half)
    passes.run(found.append, progress)
    head, *heads, embedding = found
    assert isinstance(head, Sensitivity)
    assert isinstance(embedding, EmbeddingSensitivity)
    blocks = {one.name: one.blocks for one in heads if isinstance(one, HeadCurvature)}
    return Curvatures(embedding_curvature(head, embedding), blocks)


def predictions_of(batches: Sequence[Batch]) -> int:
    """How many tokens have a next one."""
    return sum(length - 1 for batch in batches for length in batch.lengths)


def _predicting(batch: Batch) -> torch.Tensor:
    """bool[windows, n]: positions whose next token exists."""
    lengths = np.asarray(batch.lengths)[:, None]
    return torch.from_numpy(np.arange(batch.tokens.shape[1])[None] < lengths - 1)


class Gradients(Builder):
    """What goes back: gradients at a layer's output become those at its input, and its sensitivities are known."""

    def __init__(
        self,
        model: LayeredModel,
        weights: LevelWeights,
        there: Stream,
        take: Take,
        results: Resumable,
        *,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        """``there``: the stream that went forward, with the states that entered each layer. ``held_out``: as of
        ``SensitivityPass``."""
        super().__init__(weights)
        self._wants = Wants(gram=True, held_out=held_out)
        self.model, self._there, self._take, self._results = model, there, take, results

    def arrays(self) -> Arrays:
        """As ``Resumable``: the results so far."""
        return self._results.arrays()

    def build(self, stream: Stream, layer: int, states: States) -> None:
        """As ``Builder``."""
        block = self.load(self.model, layer)
        entered = self._there.entered.pop()
        shards = [self._shard(stream, shard, layer, block, entered, states) for shard in stream.shards]
        watch, energies = self._summed([(one, squares) for one, squares, _ in shards])
        _summed_heads([heads for *_, heads in shards], self._take)
        self._there.shelf.give_back(entered)
        held, predictions = set(self.model.layer_names(layer)), predictions_of(stream.batches)
        for shared, statistics in watch.results(layer).items():
            seen = tuple(statistics)
            for parameter in self.model.kind(layer).parameters:
                for role, rows in _by_role(self.model, block, parameter, energies, len(seen)):
                    if role in shared.roles and layer_tensor(layer, role) in held:
                        columns = self.model.columns(layer, role)
                        own = seen if columns is None else tuple(one.moved(columns) for one in seen)
                        self._take(Sensitivity(layer_tensor(layer, role), own, rows, predictions))

    def _shard(
        self, stream: Stream, shard: Sequence[Batch], layer: int, block: nn.Module, entered: States, gradients: States
    ) -> tuple[InputWatch, _Energies, _Heads]:
        """Gram matrices of what is read, sums of squared gradients of what is written, over a shard."""
        watch = InputWatch(self.model.inputs(layer, block), self._wants, half=stream.half)
        energies, heads = _Energies(self.model, layer, block), _Heads(self.model, layer, block)
        for batch in shard:
            with watch.on(block, batch), energies.on(block), heads.on(block, batch):
                send_back(self.model, block, layer, batch, entered, gradients, half=stream.half)
        return watch, energies, heads

    def _summed(self, shards: Sequence[tuple[InputWatch, _Energies]]) -> tuple[InputWatch, dict[str, torch.Tensor]]:
        first = shards[0][1]
        for _, later in shards[1:]:
            first.merge(later)
        return merged([watch for watch, _ in shards]), first.sums


class _Energies:
    """Sums of squared gradients f64[columns] of what the modules write that read a shared input, by module."""

    def __init__(self, model: LayeredModel, layer: int, block: nn.Module) -> None:
        reads = {role for shared in model.inputs(layer, block) for role in shared.roles}
        present = {name for name, _ in block.named_modules()}
        owners = [p.path.rpartition(".")[0] for p in model.kind(layer).parameters if reads & set(p.roles)]
        self._writers = [name for name in dict.fromkeys(owners) if name in present]
        self.sums: dict[str, torch.Tensor] = {}

    def on(self, block: nn.Module) -> ExitStack:
        """Hooks for one batch."""
        hooks = ExitStack()
        for name in self._writers:
            hooks.callback(block.get_submodule(name).register_forward_hook(self._writing(name)).remove)
        return hooks

    def merge(self, later: _Energies) -> None:
        """Add those of a later shard."""
        for name, squares in later.sums.items():
            self.sums[name] = self.sums.get(name, 0) + squares

    def _writing(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def arrived(gradient: torch.Tensor) -> None:
            squares = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0)
            self.sums[name] = self.sums.get(name, 0) + squares

        return _on_gradient(arrived)


def _on_gradient(arrived: Callable[[torch.Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    """A module's hook that hands over the gradients at what it writes."""

    def seen(_: nn.Module, __: Any, out: Any) -> None:
        written = out if isinstance(out, torch.Tensor) else out[0]
        if written.requires_grad:  # what only chooses places to look at (GLM-5's indexer) has no gradient
            written.register_hook(arrived)

    return seen


def _by_role(
    model: LayeredModel, block: nn.Module, parameter: Parameter, energies: Mapping[str, torch.Tensor], matrices: int
) -> Iterator[tuple[str, F64]]:
    """Row weights f64[matrices, rows] of each GGUF tensor that a parameter is made of."""
    module, _, leaf = parameter.path.rpartition(".")
    if leaf == "bias" or module not in energies or tensor_at(block, parameter.path).ndim < 2:
        return
    whole = energies[module].cpu().numpy()
    if leaf != "weight":  # fused experts: only what all of them wrote together has a gradient of its own
        rows = tensor_at(block, parameter.path).shape[-2] // len(parameter.roles)
        for part, role in enumerate(parameter.roles):
            if not isinstance(parameter.transform, str):
                rows = parameter.transform.shape_of(part)[-2]
            each = whole if len(whole) == rows else np.full(rows, whole.mean())
            yield role, np.tile(each, (matrices, 1))
        return
    if not isinstance(parameter.transform, str):
        for part, role in enumerate(parameter.roles):
            if (own := parameter.transform.per_row(part, whole)) is not None:
                shape = parameter.transform.shape_of(part)
                yield role, own.reshape(-1, shape[-2]) if len(shape) > 2 else np.tile(own, (matrices, 1))
        return
    if parameter.transform == "unpermute":
        heads = model.model.dims.n_head if "q_proj" in module else model.model.dims.n_head_kv
        whole = permute(whole.astype(np.float32), heads).astype(np.float64)
    for role, share in zip(parameter.roles, np.split(whole, len(parameter.roles)), strict=True):
        yield role, np.tile(share, (matrices, 1))


class _Heads:
    """Sums of ``g g^T`` f64[heads, d, d] at what queries and keys write, by tensor, rows as the tensor has them."""

    def __init__(self, model: LayeredModel, layer: int, block: nn.Module) -> None:
        dims, held = model.model.dims, set(model.layer_names(layer))
        self._rows: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = 0
        """Those after the first of each window."""
        self.first: dict[str, float] = {}
        present = {name for name, _ in block.named_modules()}
        for parameter in model.kind(layer).parameters:
            module, _, leaf = parameter.path.rpartition(".")
            if not set(parameter.roles) & set(HEADS) or leaf != "weight" or module not in present:
                continue
            count = tensor_at(block, parameter.path).shape[-1 if parameter.turned else 0]
            places = {module: torch.arange(count, dtype=torch.float64)}
            for role, rows in _by_role(model, block, parameter, places, 1):
                heads = {"attn_q.weight": dims.n_head, "attn_k.weight": dims.n_head_kv}.get(role, 0)
                name = layer_tensor(layer, role)
                if name in held and heads and rows.shape[1] % heads == 0:
                    own = torch.from_numpy(rows[0].astype(np.int64)).reshape(heads, -1)
                    self._rows.setdefault(module, []).append((name, own))

    def on(self, block: nn.Module, batch: Batch) -> ExitStack:
        """Hooks for one batch, whose padding has no gradients."""
        hooks = ExitStack()
        self.tokens += sum(batch.lengths) - len(batch.lengths)
        for module, rows in self._rows.items():
            seen = _on_gradient(partial(self._add, rows))
            hooks.callback(block.get_submodule(module).register_forward_hook(seen).remove)
        return hooks

    def _add(self, rows: Sequence[tuple[str, torch.Tensor]], gradient: torch.Tensor) -> None:
        if gradient.ndim != 3:  # no windows of tokens: which are the first is not known
            return
        later = gradient[:, 1:].reshape(-1, gradient.shape[-1]).double()
        first = gradient[:, 0].double().square().sum(0)
        for name, places in rows:
            self.first[name] = self.first.get(name, 0) + float(first[places.to(first.device)].sum())
            each = later[:, places.to(later.device).reshape(-1)].reshape(len(later), *places.shape).transpose(0, 1)
            self.sums[name] = self.sums.get(name, 0) + each.transpose(1, 2) @ each


def _summed_heads(shards: Sequence[_Heads], take: Take) -> None:
    """The curvatures of the heads of a layer, of the sums over its shards."""
    tokens = sum(one.tokens for one in shards)
    for name in shards[0].sums:
        blocks = sum(one.sums[name].cpu().numpy() for one in shards)
        blocks, first = np.asarray(blocks), sum(one.first[name] for one in shards)
        first /= max(first + float(np.einsum("hkk->", blocks)), np.finfo(np.float64).tiny)
        blocks = blocks / max(1, tokens)
        for own in blocks:
            gptq.shrink(own, tokens)
            own[np.diag_indices_from(own)] += _DAMP * own.diagonal().mean() + np.finfo(np.float32).tiny
        if np.isfinite(held := blocks.astype(np.float32)).all():  # else its rows stand alone
            take(HeadCurvature(name, held, first))
