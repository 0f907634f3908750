"""The walk, transformers and the engine compared on a few tokens of one model, and what can be trusted for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitladder.errors import BadInput, BitladderError, EngineError, NothingFits, UnknownArchitecture
from bitladder.records.fidelity import Way
from bitladder.records.selfcheck import ComparedPair, ComparedSide, Implementation, SelfCheck
from bitladder.stages.engine_way import engine_missing, way_for
from bitladder.stages.forecast import forecast, walking_need, weights_used
from bitladder.stages.job import Job, Work, opened
from bitladder.units import Basis, human_bytes

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from bitladder.plan.preflight import JobNeed
    from bitladder.walk.own_forward import OwnForward
    from bitladder.walk.trace import Step, Trace

WALK, TRANSFORMERS, ENGINE = Implementation.WALK, Implementation.TRANSFORMERS, Implementation.ENGINE
WINDOWS, TOKENS, LAST = 2, 64, 16
"""Windows, tokens of each, and tokens of each whose predictions are compared."""
_LONGEST = 256
"""A sliding window is reached by default where that takes no more tokens."""
_FLOATS = {"F32", "F16", "BF16"}


def selfcheck_model(model: str, work: Work, *, tokens: int | None = None) -> SelfCheck:
    """Compare whatever can compute the model, layer by layer.

    Args:
        model: as every verb takes it.
        work: threads, progress, and where warnings go.
        tokens: of each window; by default 64, or a few more than a sliding window that is not long.

    Raises:
        UnknownArchitecture: fewer than two implementations can compute it; the message says of each why.
        NothingFits: the same, for lack of memory.
        BadInput: more tokens than it was trained for.
        BitladderError: the model is not found or not sound.
    """
    with opened(model, work) as job:
        return _Check(job, _length(job, tokens)).run()


def _length(job: Job, tokens: int | None) -> int:
    trained = job.source.model.dims.n_ctx_train
    if tokens is not None:
        if not LAST <= tokens <= trained:
            raise BadInput(
                f"Windows of {tokens} tokens cannot be compared: the model was trained for {trained}.",
                do=f"Give --tokens between {LAST} and {trained}.",
            )
        return tokens
    reached = [size + 32 for size in _sliding(job) if size + 32 <= _LONGEST]
    return min(max([TOKENS, *reached]), trained)


def _sliding(job: Job) -> dict[int, int]:
    """Sliding windows in tokens, with how many layers have them."""
    from bitladder.describe.cache import layer_caches

    found: dict[int, int] = {}
    for cache in layer_caches(job.source.model):
        if cache.window:
            found[cache.window] = found.get(cache.window, 0) + cache.count
    return found


@dataclass
class _Check:
    """One comparison, from choosing tokens to what can be trusted."""

    job: Job
    n: int
    traces: dict[Implementation, Trace] = field(default_factory=dict)
    how: dict[Implementation, str] = field(default_factory=dict)
    missing: dict[Implementation, str] = field(default_factory=dict)
    rounded: torch.Tensor | None = None
    """Logits of a pass of the walk that rounds as the engine does."""
    checkpoint: Path | None = None
    """The folder that transformers reads instead of the file."""

    def run(self) -> SelfCheck:
        """All of it, within a forecast of what it takes."""
        job = self.job
        self.checkpoint = self._usable_checkpoint()
        needs = self._needs()
        if len(needs) < 2:
            raise self._nothing()
        total = WINDOWS * self.n
        words = f"compare {' and '.join(needs)} on {total} tokens"
        need = replace(
            max(needs.values(), key=lambda one: one.ram_bytes),
            what=words, kind="selfcheck", seconds=sum(one.seconds for one in needs.values()), label=Basis.ASSUMED,
        )  # fmt: skip
        with forecast(need, job.journal):
            tokens, text = self._tokens()
            comparisons = self._compare(tokens, needs)
        if not comparisons:
            raise self._nothing()
        return self._record(comparisons, text)

    # Who can go

    def _usable_checkpoint(self) -> Path | None:
        """The folder that the file was converted from, where its weights are floats and those of the file, too."""
        from bitladder.files.checkpoint import read_checkpoint
        from bitladder.files.convert import checkpoint_of
        from bitladder.files.decoded import decoding_of

        folder = self.job.found.checkpoint or checkpoint_of(self.job.source.path)
        if folder is None or not {tensor.qtype for tensor in self.job.source.model.tensors} <= _FLOATS:
            return None
        try:
            return folder if decoding_of(read_checkpoint(folder)) is None else None
        except BitladderError:
            return None

    def _needs(self) -> dict[Implementation, JobNeed]:
        """What each will take, of those against which nothing speaks yet."""
        from bitladder.files.probe import probe_machine

        machine = probe_machine()
        needs = {}
        for name, need in (
            (ENGINE, self._engine_need()), (TRANSFORMERS, self._transformers_need()), (WALK, self._walk_need()),
        ):  # fmt: skip
            if need.ram_bytes > machine.ram_available:
                self.missing[name] = (
                    f"it needs {human_bytes(need.ram_bytes)} of memory, {human_bytes(machine.ram_available)} are free"
                )
            elif name is ENGINE and (why := engine_missing(self.job.source.model)):
                self.missing[name] = why
            else:
                needs[name] = need
        return needs

    def _operations(self) -> float:
        model = self.job.source.model
        return 2 * (weights_used(model) + model.dims.n_vocab * model.dims.n_embd) * WINDOWS * self.n

    def _traces_bytes(self) -> int:
        dims = self.job.source.model.dims
        return 4 * WINDOWS * (3 * self.n * dims.n_embd * dims.n_layer + 8 * LAST * dims.n_vocab)

    def _engine_need(self) -> JobNeed:
        from bitladder.engines.llama_library import piece_length
        from bitladder.files.probe import probe_machine
        from bitladder.plan.engine_need import context_bytes, engine_need

        model = self.job.source.model
        context = context_bytes(model, self.n, min(self.n, piece_length(model.dims.n_vocab)))
        size = sum(header.path.stat().st_size for header in self.job.source.headers)
        return engine_need("engine", [size], context, [self._operations()], probe_machine(), self.job.threads)

    def _walk_need(self) -> JobNeed:
        from bitladder.describe.windows import Window

        windows = [Window("", np.zeros(self.n, np.int64))] * WINDOWS
        need = walking_need(self.job.source, windows, ["rounded", "engine", "engine rounded", "transformers"])
        return replace(need, ram_bytes=need.ram_bytes + self._traces_bytes())

    def _transformers_need(self) -> JobNeed:
        """A layer, embedding and head of a checkpoint; all weights of a GGUF file. In 32-bit floats."""
        from bitladder.files.probe import probe_machine
        from bitladder.plan.preflight import BASE_BYTES, walk_need

        model, tensors = self.job.source.model, self.job.source.model.tensors
        weights = sum(tensor.elements for tensor in tensors)
        inside: dict[str, int] = {}
        for tensor in tensors:
            place = ".".join(tensor.name.split(".")[:2]) if tensor.name.startswith("blk.") else ""
            inside[place] = inside.get(place, 0) + tensor.elements
        outside = inside.pop("", 0)
        held = outside + 2 * max(inside.values(), default=0) if self.checkpoint else weights
        whole = 4 * WINDOWS * self.n * model.dims.n_vocab
        need = walk_need(0, 0, WINDOWS * self.n, model.dims.n_embd, 0, self._operations(), probe_machine())
        return replace(need, ram_bytes=2 * BASE_BYTES + 4 * held + 2 * whole + self._traces_bytes())

    def _nothing(self) -> BitladderError:
        reasons = [f"{name.value}: {why}" for name, why in self.missing.items()]
        able = [name.value for name in Implementation if name not in self.missing]
        alone = f"only {able[0]} can compute it" if able else "nothing here can compute it"
        if any("of memory" in why for why in self.missing.values()):
            return NothingFits(
                f"There is too little memory to compare anything: {alone}.",
                means="\n".join(reasons),
                do="Close other programs, or compare on a larger machine.",
            )
        return UnknownArchitecture(
            f"There is nothing to compare for '{self.job.source.model.dims.architecture}': {alone}.",
            means="\n".join(reasons),
            do="Give the model's checkpoint folder or hf:org/name instead of the file: transformers can run that, too.",
        )

    # The tokens

    def _tokens(self) -> tuple[NDArray[np.int64], str]:
        """int64[windows, n], with where they come from: the measuring text, else any of the vocabulary."""
        from bitladder.files.texts import shipped_texts

        try:
            windows = self.job.windows(shipped_texts())
        except (EngineError, BadInput):
            windows = []
        long = {window.document: window.tokens[: self.n] for window in windows if len(window.tokens) >= self.n}
        if len(long) >= WINDOWS:
            return np.stack(list(long.values())[:WINDOWS]), "the text that ships for measuring"
        vocabulary = self.job.source.model.dims.n_vocab
        return np.random.default_rng(0).integers(0, vocabulary, (WINDOWS, self.n)), "random tokens of the vocabulary"

    # Passes

    def _compare(self, tokens: NDArray[np.int64], needs: Mapping[Implementation, JobNeed]) -> list[ComparedPair]:
        own = None
        if ENGINE in needs:
            self._engine(tokens)
        if TRANSFORMERS in needs:
            own = self._transformers(tokens)
        made = self._walk(tokens) if WALK in needs and self.traces else []
        if own is not None and ENGINE in self.traces and not (made and all(one.agrees for one in made)):
            made.append(self._without_walk(own, tokens))
        return made

    def _engine(self, tokens: NDArray[np.int64]) -> None:
        from bitladder.files.engine_package import ENGINE as PACKAGE
        from bitladder.files.engine_package import engine_version
        from bitladder.stages.engine_trace import engine_trace

        try:
            self.traces[ENGINE] = engine_trace(
                self.job.source, tokens, self.job.progress, last=LAST, threads=self.job.threads
            )
            self.how[ENGINE] = f"llama.cpp in {PACKAGE} {engine_version()}, on the file"
        except EngineError as error:
            self.missing[ENGINE] = error.found

    def _transformers(self, tokens: NDArray[np.int64]) -> OwnForward | None:
        from bitladder.walk.own_forward import CheckpointForward, GgufForward

        try:
            if self.checkpoint is not None:
                own: OwnForward = CheckpointForward(self.checkpoint)
                self.how[TRANSFORMERS] = "its own forward pass, weights from the checkpoint, a layer at a time"
            elif len(self.job.source.headers) > 1:
                self.missing[TRANSFORMERS] = "it reads no GGUF file that is cut into parts, and there is no checkpoint"
                return None
            else:
                own = GgufForward(self.job.source.path)
                self.how[TRANSFORMERS] = "its own forward pass, on the GGUF file as transformers itself decodes it"
            self.traces[TRANSFORMERS] = own.trace(tokens, self.job.progress, last=LAST)
        except BitladderError as error:
            self.missing[TRANSFORMERS] = error.found
            return None
        return own

    def _walk(self, tokens: NDArray[np.int64]) -> list[ComparedPair]:
        from bitladder.walk.opened import layered
        from bitladder.walk.trace import walked
        from bitladder.walk.weights import FileWeights
        from bitladder.walk.whole import WholeModel

        weights = FileWeights(self.job.source, threads=self.job.threads)
        try:
            model = layered(self.job.source, weights)
            own, self.rounded, steps = walked(
                model, weights, tokens, self.traces, self.job.progress,
                rounding={ENGINE} & self.traces.keys(), last=LAST,
            )  # fmt: skip
        except BitladderError as error:
            self.missing[WALK] = error.found
            return []
        derived = isinstance(model, WholeModel)
        architecture = self.job.source.model.dims.architecture
        self.how[WALK] = (
            "transformers' layers, found over the checkpoint" if derived else f"layers by the rows of '{architecture}'"
        )
        others, self.traces[WALK] = list(self.traces), own
        return [self._comparison(WALK, other, steps[other], self.rounded) for other in others]

    def _without_walk(self, own: OwnForward, tokens: NDArray[np.int64]) -> ComparedPair:
        """transformers beside the engine: where there is no walk, or it parts from one of them."""
        qtype_of, given = _LayerTypes(self.job), self.traces[ENGINE]
        steps = own.again(tokens, given, self.job.progress, qtype_of=qtype_of, last=LAST) if given.states else []
        rounded = self.rounded
        if rounded is None:
            rounded = own.rounded_logits(tokens, self.job.progress, qtype_of=qtype_of, last=LAST)
        return self._comparison(TRANSFORMERS, ENGINE, steps, rounded)

    def _comparison(
        self, one: Implementation, other: Implementation, steps: Sequence[Step], rounded: torch.Tensor
    ) -> ComparedPair:
        from bitladder.plan.selfcheck import bound_of, comparison, layer_gap
        from bitladder.walk.trace import divergence

        routed = bool(self.job.source.model.dims.n_expert)
        bound = bound_of(one, other, routed=routed, weight_share=self._weight_share())
        layers = [layer_gap(s.layer, s.gap, s.rounding, s.change, s.size, bound) for s in steps]
        kl, top1 = divergence(self.traces[other].logits, self.traces[one].logits)
        loose = WALK if WALK in self.traces else TRANSFORMERS
        kl_rounding = divergence(rounded, self.traces[loose].logits)[0] if ENGINE in (one, other) else 0.0
        unseen = "" if layers else "the states after its layers cannot be seen"
        return comparison(one, other, layers, bound, kl_mean=kl, kl_rounding=kl_rounding, top1=top1, unseen=unseen)

    def _weight_share(self) -> float:
        """What rounding a checkpoint's weights to the file's type may change; nothing where none were rounded."""
        from bitladder.files.checkpoint import read_checkpoint
        from bitladder.plan.selfcheck import WEIGHT_SHARES

        if self.checkpoint is None:
            return 0.0
        held = read_checkpoint(self.checkpoint).main_dtype
        types = {tensor.qtype for tensor in self.job.source.model.tensors if len(tensor.shape) > 1}
        return max((WEIGHT_SHARES[qtype] for qtype in types & WEIGHT_SHARES.keys() if qtype != held), default=0.0)

    # What follows

    def _record(self, comparisons: Sequence[ComparedPair], text: str) -> SelfCheck:
        from bitladder.plan.selfcheck import blind_spots, trust

        job, model = self.job, self.job.source.model
        compared = tuple(
            ComparedSide(name, self.how.get(name, "") if name in self.traces else "", self._why_not(name))
            for name in Implementation
        )
        return SelfCheck(
            model=job.found.label,
            architecture=model.dims.architecture,
            n_layer=model.dims.n_layer,
            windows=WINDOWS,
            tokens=self.n,
            text=text,
            compared=compared,
            comparisons=tuple(comparisons),
            trust=trust(
                compared, comparisons, measured_by=self._measured_by(),
                from_checkpoint=self.checkpoint is not None and TRANSFORMERS in self.traces,
            ),
            notes=blind_spots(_sliding(job), self.n, model.dims.n_ctx_train),
            agrees=all(one.agrees for one in comparisons),
        )  # fmt: skip

    def _why_not(self, name: Implementation) -> str:
        return "" if name in self.traces else self.missing.get(name, "there is nothing to compare it with")

    def _measured_by(self) -> Implementation:
        """What fidelity and importance of this model come from, as ``measure`` chooses."""
        try:
            way = way_for(self.job.source)
        except UnknownArchitecture:
            way = Way.ENGINE
        return WALK if way is Way.WALK and WALK in self.traces else ENGINE


class _LayerTypes:
    """The type that most weights of a layer have, by its number; the head's by the number of layers."""

    def __init__(self, job: Job) -> None:
        from bitladder.formats import roles

        model = job.source.model
        largest: dict[int, tuple[int, str]] = {}
        for tensor in model.tensors:
            parts = tensor.name.split(".")
            if parts[0] == "blk":
                at = int(parts[1])
            elif tensor.name in (roles.OUTPUT, roles.EMBEDDING):
                at = model.dims.n_layer
            else:
                continue
            preferred = tensor.elements + (1 << 62 if tensor.name == roles.OUTPUT else 0)
            largest[at] = max(largest.get(at, (0, "F32")), (preferred, tensor.qtype))
        self._types = {at: qtype for at, (_, qtype) in largest.items()}

    def __call__(self, layer: int) -> str:
        return self._types.get(layer, "F32")
