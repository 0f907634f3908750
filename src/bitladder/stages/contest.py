"""Who is timed and who is asked: those that the decision may still choose, in turns, until it would change nothing.

Losses of predictions come first, since they are measured of all levels at once and close most of them. Then the levels
that may be chosen are timed, and the tiers that the decision would name are asked, with whatever other runs might
choose; where answers veto one, what takes its place is asked, until everything named has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bitladder.plan.schedule import contending, holding, worth_asking
from bitladder.stages.ask import Asker, Asking, LevelToAsk, name_of
from bitladder.stages.speeds import Race

if TYPE_CHECKING:
    from bitladder.records.decision import Decision
    from bitladder.records.evaluation import LevelAnswers
    from bitladder.stages.ask import Contender

    Decide = Callable[[Sequence[LevelAnswers]], Decision]


def answers_that_matter(
    asker: Asker, contenders: Sequence[Contender], decide: Decide, sizes: Mapping[str, int], *, every: bool = False
) -> list[LevelAnswers]:
    """Answers and speeds of levels that can be chosen, and of whatever is no level in a file; the reference's first.

    Args:
        asker: asks and judges.
        contenders: all that may be asked, the reference first.
        decide: the decision that so much leads to.
        sizes: bytes by level.
        every: ask every level that may hold the bar, since what is tried later (guesses ahead) may choose any of them.

    Raises:
        EngineError, UsageError, BadWorkload: as ``Asker.ask_all``.
    """
    asking = Asking(asker, contenders)
    own, *rivals = contenders
    levels = {name_of(one): one for one in rivals if isinstance(one, LevelToAsk)}
    for one in rivals:
        if not isinstance(one, LevelToAsk):
            asking.ask(one)
    timed = False
    while True:
        decision = decide(asking.so_far())
        wanted = worth_asking(decision, sizes) | (contending(decision) if every else set())
        missing = [one for name, one in levels.items() if name in wanted and not asking.has_asked(one)]
        if not timed and (decision.quality is not None or not missing):
            # what may be chosen is known, or nothing that answers could change
            timed = True
            racing = [one for name, one in levels.items() if name in contending(decision)]
            beside = [own] if isinstance(own, LevelToAsk) and racing else []
            asking.time([*beside, *racing], _race(decision, map(name_of, [*beside, *racing])))
        elif missing:
            for one in missing:
                asking.ask(one)
        else:
            return asking.finished()


def _race(decision: Decision, names: Iterable[str]) -> Race:
    """The level for quality stays, since the fast one must be faster; where one is chosen, those that are not known to
    hold the bar are timed in the first rounds alone, and drive nobody out, as the reference does not."""
    rivals = holding(decision) or contending(decision)
    timed = list(names)
    stays = frozenset(name for name in timed if name == decision.quality)
    return Race(stays, frozenset(name for name in timed if name not in rivals))
