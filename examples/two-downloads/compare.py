"""Two files of the same model side by side: the same inputs through both, and what is different.

    python examples/two-downloads/compare.py REFERENCE.gguf OTHER.gguf [--workload FILE] [--threads 2]

The first file is the reference; usually the larger one. Works with files from any tool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bitladder.engines.base import Launch
from bitladder.engines.registry import start
from bitladder.files.workloads import STARTER, load_workload
from bitladder.records.evaluation import LevelAnswers
from bitladder.serve.compare import Comparison, Parting
from bitladder.serve.compare import compare as compare_answers
from bitladder.stages.evaluate import answer_workload, compare, judge_answers, level_answers, measure_speed
from bitladder.stages.wording import wording_changes
from bitladder.units import human_bytes


def main() -> None:
    """Ask both files and print what is different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--workload", default=STARTER)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--price-per-hour", type=float, default=1.0, help="of the machine; for the cost of decoding")
    options = parser.parse_args()
    workload = load_workload(options.workload)

    first, second = (
        Launch(path, n_ctx=2048, n_parallel=options.parallel, threads=options.threads)
        for path in (options.reference, options.other)
    )
    with start(first) as server:
        answers = judge_answers(workload, answer_workload(server, workload))
        reference = level_answers(options.reference.stem, answers, measure_speed(server))
        with start(second) as other_server:
            partings = {one.id: compare_answers(server, other_server, one.messages) for one in workload.inputs}
    with start(second) as server:
        answers = judge_answers(workload, answer_workload(server, workload), reference=reference.answers)
        other = level_answers(options.other.stem, answers, measure_speed(server))

    costs = [
        describe(level, path, options.price_per_hour)
        for level, path in ((reference, options.reference), (other, options.other))
    ]
    print(f"Decoding with {other.level} costs {costs[1] / costs[0]:.0%} of what it costs with {reference.level}.")
    result = compare(reference, other, workload)
    print(
        f"\nPasses {sum(answer.passed for answer in reference.answers)} -> {result.passes} of {result.inputs} "
        f"(95% interval {result.pass_low:.0%} to {result.pass_high:.0%}); lost {len(result.lost)}, "
        f"gained {len(result.gained)}, p = {result.p_value:.2f}. "
        f"A true loss under {result.smallest_visible_loss:.0%} would usually go unseen."
    )
    for tag in result.tags:
        if tag.lost or tag.gained:
            print(f"  {tag.tag}: {tag.passes} of {tag.inputs} pass, lost {tag.lost}, gained {tag.gained}")

    kinds = [kind(found) for found in partings.values()]
    counts = ", ".join(f"{kinds.count(one)} {one}" for one in ("identical", "tie-break", "diverged"))
    print(f"\nAnswers: {counts}. First partings that are no tie:")
    for name in [name for name, found in partings.items() if kind(found) == "diverged"][:5]:
        at = next(place for place in places(partings[name]) if not place.is_tie)
        print(
            f"  {name}, token {at.index}: {at.token_a!r} -> {at.token_b!r} "
            f"(probability of its own word: {at.a_of_a:.2f} there, {at.b_of_b:.2f} here)"
        )

    changes = wording_changes(workload, reference.answers, other.answers)
    print(f"\nWords: {changes.changed_answers} of {changes.answers} answers differ. Substitutions seen most:")
    for change in changes.substitutions[:8]:
        print(f"  {change.count} x  {change.before or '(nothing)'!s} -> {change.after or '(nothing)'!s}")
    print(f"  numbers changed in: {', '.join(changes.changed_numbers) or 'none'}")
    print(f"  JSON broken in: {', '.join(changes.broken_format) or 'none'}")
    if changes.reference_items:
        kept = changes.reference_items - len(changes.missing_items)
        print(f"  found {kept} of {changes.reference_items} items that the reference found; missing:")
        for name, item in changes.missing_items:
            print(f"    {name}: {item}")
    print(f"  end in a loop, and did not before: {', '.join(changes.looping) or 'none'}")


def places(found: Comparison) -> list[Parting]:
    """Every place where the other file prefers another token after the same words."""
    return [found.parting, *(found.later or ())] if found.parting else []


def kind(found: Comparison) -> str:
    """What all of an answer's partings come to."""
    if not places(found):
        return "identical"
    return "tie-break" if all(place.is_tie for place in places(found)) else "diverged"


def describe(level: LevelAnswers, path: Path, price_per_hour: float) -> float:
    """Size, speed and what a million decoded tokens cost with one request at a time; returns that cost."""
    rate = level.speed.decode_tokens_per_s
    cost = price_per_hour * 1e6 / rate / 3600
    print(
        f"{level.level}: {human_bytes(path.stat().st_size)}, decode {rate:.1f} tokens/s, "
        f"prefill {level.speed.prefill_tokens_per_s:.0f} tokens/s, {cost:.2f} per million decoded tokens"
        f" (other programs took {level.speed.others_share:.0%} of the processor meanwhile)"
    )
    return cost


if __name__ == "__main__":
    main()
