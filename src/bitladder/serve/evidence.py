"""From what a workload showed to what ``auto`` does, and whether it is worth doing.

A route is a function from an input to "needs the quality tier". It is made on one half of the workload and
judged on the other, many times over random halves; what it then recovers and costs is what a user may
expect, since the inputs that come tomorrow took no part in making it either. Undefined is not zero: without
a loss there is nothing to recover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitladder.records.evaluation import Answer, LevelAnswers, Speed
from bitladder.records.run import InputFacts
from bitladder.serve.escalation import (
    MAX_EXTRA_COST,
    MIN_RECOVERED,
    ScoredInput,
    calibrate,
    is_sure,
)
from bitladder.serve.router import QUALITY, SPEED, AutoRule, TagEvidence
from bitladder.serve.similarity import Similarity
from bitladder.stats.intervals import wilson

_UNTAGGED = "untagged"
_COVERED = 0.9
"""Share of the net loss that the tags sent to the quality tier hold; what pays must recover ``MIN_RECOVERED`` of it on
inputs that took no part in choosing them.
"""


@dataclass(frozen=True)
class RoutedInput:
    """One input of the workload as both tiers answered it; seconds as the engine's rates say."""

    id: str
    prompt: str
    tags: tuple[str, ...]
    speed_passed: bool
    quality_passed: bool
    speed_s: float
    quality_s: float
    score: float = math.nan
    """The speed tier's lowest token log-probability, when it was recorded."""

    @property
    def lost(self) -> bool:
        """The quality tier passed it and the speed tier did not."""
        return self.quality_passed and not self.speed_passed

    @property
    def scored(self) -> ScoredInput:
        """What escalation looks at."""
        return ScoredInput(self.score, self.speed_passed, self.quality_passed, self.speed_s, self.quality_s)


NeedsQuality = Callable[[RoutedInput], bool]
MakeRoute = Callable[[Sequence[RoutedInput]], NeedsQuality]


@dataclass(frozen=True)
class HeldOut:
    """What a way of routing does on inputs that took no part in making it, over ``splits`` random halves.

    ``recovered``: share of the speed tier's net loss made good. ``extra_cost``: added seconds per second of
    the speed tier. ``gained``: inputs passed beyond what the speed tier alone passes, as a share of all; ``gained_low``
    is exceeded in 95% of the splits.
    """

    recovered: float
    extra_cost: float
    splits: int
    gained: float = math.nan
    gained_low: float = math.nan

    @property
    def pays(self) -> bool:
        """At least 80% of the loss recovered for at most 20% more than the speed tier's cost, and fewer inputs passed
        than by the speed tier alone in no more than a twentieth of the splits: chance recovers a net loss of two inputs
        ten times over.
        """
        return self.recovered >= MIN_RECOVERED and self.extra_cost <= MAX_EXTRA_COST and self.gained_low >= 0

    def better_than(self, other: HeldOut) -> bool:
        """Whether it passes more inputs, or as many for less."""
        return (self.gained, -self.extra_cost) >= (other.gained, -other.extra_cost)


@dataclass(frozen=True)
class RoutingAdvice:
    """What to do with ``auto``, the rule itself, and the numbers behind it."""

    sentence: str
    rule: AutoRule
    by_tag: HeldOut | None = None
    by_escalation: HeldOut | None = None
    threshold: float = -math.inf
    """For escalation, when the rule uses it."""


def routed_inputs(
    inputs: Sequence[InputFacts],
    quality: LevelAnswers,
    speed: LevelAnswers,
    scores: dict[str, float] | None = None,
) -> tuple[RoutedInput, ...]:
    """Pair both tiers' answers to the same inputs; inputs that only one of them answered are left out."""
    by_quality = {answer.input_id: answer for answer in quality.answers}
    by_speed = {answer.input_id: answer for answer in speed.answers}
    paired = []
    for item in inputs:
        if item.id in by_quality and item.id in by_speed:
            best, fast = by_quality[item.id], by_speed[item.id]
            found = (scores or {}).get(item.id, math.nan)
            times = _seconds(fast, speed.speed), _seconds(best, quality.speed)
            paired.append(RoutedInput(item.id, item.prompt, item.tags, fast.passed, best.passed, *times, found))
    return tuple(paired)


def agreement_bar(quality: LevelAnswers, speed: LevelAnswers) -> float:
    """The agreement that shadow mode should expect: the lower end (95%, Wilson) of the share of equal texts.

    0.0, which never raises an alarm, when the two levels answered no input in common.
    """
    texts = {answer.input_id: answer.text for answer in quality.answers}
    pairs = [(texts[answer.input_id], answer.text) for answer in speed.answers if answer.input_id in texts]
    low = wilson(sum(a == b for a, b in pairs), len(pairs)).low
    return 0.0 if math.isnan(low) else low


def _seconds(answer: Answer, rate: Speed) -> float:
    return answer.prompt_tokens / rate.prefill_tokens_per_s + answer.completion_tokens / rate.decode_tokens_per_s


def by_tag(made_from: Sequence[RoutedInput]) -> NeedsQuality:
    """Quality where any of the input's tags needs it, or is unknown."""
    table = tag_table(made_from)
    return lambda item: any(tag not in table or table[tag].needs_quality for tag in item.tags or (_UNTAGGED,))


def by_escalation(made_from: Sequence[RoutedInput]) -> NeedsQuality:
    """Quality where the speed tier was not sure, by a threshold calibrated here."""
    threshold = calibrate([item.scored for item in made_from]).threshold
    return lambda item: not is_sure(item.score, threshold)


def tag_table(inputs: Sequence[RoutedInput]) -> dict[str, TagEvidence]:
    """What the speed tier lost, tag by tag, and which tags it serves all the same.

    With many inputs nearly every tag loses one somewhere, and "lost nothing" would send everything to the quality
    tier. So a tag is spared when it gained as much as it lost, and when the tags that lose most per second saved
    hold ``_COVERED`` of all net losses without it.
    """
    table: dict[str, TagEvidence] = {}
    saved: dict[str, float] = {}
    for item in inputs:
        for tag in item.tags or (_UNTAGGED,):
            seen = table.get(tag, TagEvidence(0, 0))
            gained = item.speed_passed and not item.quality_passed
            table[tag] = replace(seen, inputs=seen.inputs + 1, lost=seen.lost + item.lost, gained=seen.gained + gained)
            saved[tag] = saved.get(tag, 0.0) + max(0.0, item.quality_s - item.speed_s)
    net = {tag: seen.lost - seen.gained for tag, seen in table.items()}
    losing = sorted((tag for tag in table if net[tag] > 0), key=lambda tag: saved[tag] / net[tag])
    goal, covered, needed = _COVERED * sum(net[tag] for tag in losing), 0, set()
    for tag in losing:
        if covered >= goal:
            break
        needed.add(tag)
        covered += net[tag]
    return {tag: replace(seen, spared=seen.lost > 0 and tag not in needed) for tag, seen in table.items()}


def held_out(
    inputs: Sequence[RoutedInput],
    make: MakeRoute,
    generator: np.random.Generator,
    *,
    twice: bool,
    splits: int = 200,
) -> HeldOut:
    """Make a route on one half, judge it on the other, ``splits`` times; sums over all splits are compared.

    ``twice``: an input sent to the quality tier has cost the speed tier's time as well (escalation).
    """
    loss = 0
    spent = added = 0.0
    gains = []
    for _ in range(splits):
        order = generator.permutation(len(inputs))
        half = len(inputs) // 2
        route = make([inputs[i] for i in order[:half]])
        gain = 0
        for item in (inputs[i] for i in order[half:]):
            difference = item.quality_passed - item.speed_passed
            loss += difference
            spent += item.speed_s
            if route(item):
                gain += difference
                added += item.quality_s - (0.0 if twice else item.speed_s)
        gains.append(gain / max(1, len(inputs) - half))
    judged = splits * (len(inputs) - len(inputs) // 2)
    recovered = sum(gains) * judged / splits / loss if loss > 0 else math.nan
    cost = added / spent if spent > 0 else math.nan
    return HeldOut(recovered, cost, splits, float(np.mean(gains)), float(np.quantile(gains, 0.05)))


def advise(inputs: Sequence[RoutedInput], generator: np.random.Generator) -> RoutingAdvice:
    """Whether routing between these two tiers gains anything on this workload, and the rule that does it
    best.
    """
    if not inputs:
        return RoutingAdvice("No evidence: 'auto' uses the quality tier.", AutoRule())
    lost = sum(item.lost for item in inputs)
    net = sum(item.quality_passed - item.speed_passed for item in inputs)
    speed_s, quality_s = sum(item.speed_s for item in inputs), sum(item.quality_s for item in inputs)
    if net <= 0:
        return _without_net_loss(inputs, generator)
    if quality_s <= speed_s:
        return _one_tier(QUALITY, f"the speed tier lost {lost} of {len(inputs)} inputs and saves no time")
    tags = held_out(inputs, by_tag, generator, twice=False)
    has_scores = not any(math.isnan(item.score) for item in inputs)
    sure = held_out(inputs, by_escalation, generator, twice=True) if has_scores else None
    threshold = calibrate([item.scored for item in inputs]).threshold if has_scores else -math.inf
    escalate = sure is not None and sure.pays and not (tags.pays and tags.better_than(sure))
    rule = AutoRule(tags=tag_table(inputs), guess=_similarity(inputs).guess, escalate=escalate)
    chosen = sure if escalate and sure is not None else tags
    how = "the speed tier's probabilities" if escalate else "tags"
    numbers = (
        f"on held-out halves, routing by {how} recovers {_share(chosen.recovered)} of the loss "
        f"for {chosen.extra_cost:+.0%} of the speed tier's cost"
    )
    if chosen.pays:
        return RoutingAdvice(f"Routing pays: {numbers}.", rule, tags, sure, threshold)
    if chosen.extra_cost >= quality_s / speed_s - 1:
        everything = _one_tier(QUALITY, f"{numbers}, no less than the quality tier for everything")
        return replace(everything, by_tag=tags, by_escalation=sure)
    goal = f"{MIN_RECOVERED:.0%} for {MAX_EXTRA_COST:+.0%}"
    sentence = f"Routing cannot reach {goal} here: {numbers}. In doubt 'auto' uses the quality tier."
    return RoutingAdvice(sentence, rule, tags, sure, threshold)


def _without_net_loss(inputs: Sequence[RoutedInput], generator: np.random.Generator) -> RoutingAdvice:
    """Where the speed tier gained in one kind of work what it lost in another, sending only the latter to the quality
    tier may pass more than either tier does alone.
    """
    lost = sum(item.lost for item in inputs)
    because = f"the speed tier passes no fewer of your {len(inputs)} inputs than the quality tier"
    if not lost:
        because = f"no loss measured on your {len(inputs)} inputs"
    if not any(seen.needs_quality for seen in tag_table(inputs).values()):
        return _one_tier(SPEED, because)
    tags = held_out(inputs, by_tag, generator, twice=False)
    gained = f"{100 * tags.gained:+.1f} inputs of 100"
    if tags.gained_low > 0 and tags.extra_cost <= MAX_EXTRA_COST:
        sentence = (
            f"Routing pays: {because}, and yet loses some kinds of work; on held-out halves, routing by tags passes "
            f"{gained} for {tags.extra_cost:+.0%} of its cost."
        )
        return RoutingAdvice(sentence, AutoRule(tags=tag_table(inputs), guess=_similarity(inputs).guess), tags)
    unsure = f"{gained} on average over held-out halves, {100 * tags.gained_low:+.1f} in the worst twentieth of them"
    return replace(_one_tier(SPEED, because, f", and routing by tags may not pass more ({unsure})"), by_tag=tags)


def _share(recovered: float) -> str:
    """More than all is possible, where the quality tier gained beside what was lost."""
    return "all" if recovered >= 1 else f"{recovered:.0%}"


def _one_tier(tier: str, because: str, numbers: str = "") -> RoutingAdvice:
    """One tier for everything. ``because`` stands in every answer's header, ``numbers`` only where it is decided."""
    sentence = (
        f"Routing gains nothing: {because}{numbers}. Deploy the {tier} tier alone; 'auto' uses it for everything."
    )
    return RoutingAdvice(sentence, AutoRule(fixed=tier, because=because))


def _similarity(inputs: Sequence[RoutedInput]) -> Similarity:
    return Similarity([(item.id, tag, item.prompt) for item in inputs for tag in item.tags or (_UNTAGGED,)])
