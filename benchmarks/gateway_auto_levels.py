"""Claim: `auto` recovers at least 80% of the speed tier's loss for at most 20% more cost, or says that it cannot.

``python gateway_auto_levels.py QUALITY.gguf SPEED.gguf --answers FOLDER`` asks two levels of one model the 320
inputs of ``auto_workload.py`` through the real engine, and keeps every answer in the folder, so that it can be
stopped and started again. Then, on both sides of one split of each kind of work in halves: the rule that the
gateway makes at its start from one half, and what it does on the other, with tags told and without; and both
ways of routing over 200 random halves. Cost is engine time at each level's measured rates. JSON is the last line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import gateway_setup
import numpy as np
from auto_workload import EACH, write_workload

from bitladder.describe.workload import Workload
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.workloads import load_workload
from bitladder.records import to_json
from bitladder.records.evaluation import Answer, LevelAnswers, Speed
from bitladder.records.reading import from_json
from bitladder.serve.escalation import is_sure
from bitladder.serve.evidence import RoutedInput, RoutingAdvice, advise, routed_inputs
from bitladder.serve.router import AUTO, QUALITY, Features, choose
from bitladder.stages.evaluate import answer_workload, judge_answers, level_answers, measure_speed
from bitladder.stages.run_facts import input_facts

PARALLEL = 2


def asked(path: Path, workload: Workload, folder: Path, threads: int) -> LevelAnswers:
    """A level's answers, those that are missing asked for."""
    kept = folder / f"{path.stem}.jsonl"
    known: dict[str, Answer] = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            answer = from_json(Answer, json.loads(line))
            known[answer.question] = answer
    rates = folder / f"{path.stem}-speed.json"
    with LlamaServer(Launch(path, n_ctx=1024, n_parallel=PARALLEL, threads=threads)) as server, kept.open("a") as log:

        def keep(answer: Answer) -> None:
            log.write(json.dumps(to_json(answer)) + "\n")
            log.flush()

        replies = answer_workload(server, workload, known=known, on_answer=keep, logprobs=1)
        if not rates.exists():
            rates.write_text(json.dumps(to_json(measure_speed(server))))
    speed = from_json(Speed, json.loads(rates.read_text()))
    return level_answers(path.stem, judge_answers(workload, replies), speed)


def outcome(inputs: Sequence[RoutedInput], advice: RoutingAdvice, *, tagged: bool) -> dict[str, float | None]:
    """What the gateway would do with these inputs under a rule made from others."""
    loss = gain = kept = 0
    spent = added = 0.0
    for item in inputs:
        features = Features(AUTO, tags=item.tags if tagged else (), asked=_says(item.prompt))
        choice = choose(features, frozenset(), (), advice.rule)
        assert choice is not None
        difference = item.quality_passed - item.speed_passed
        loss += difference
        spent += item.speed_s
        if choice.tier == QUALITY:
            gain += difference
            added += item.quality_s - item.speed_s
        elif choice.escalate and not is_sure(item.score, advice.threshold):
            gain += difference
            added += item.quality_s
        else:
            kept += 1
    recovered = round(gain / loss, 3) if loss > 0 else None
    cost = round(added / spent, 3)
    return {"net_loss": loss, "gained": gain, "recovered": recovered, "extra_cost": cost, "on_speed": kept}


def _says(text: str) -> Callable[[], str]:
    return lambda: text


def halves(inputs: Sequence[RoutedInput]) -> tuple[list[RoutedInput], list[RoutedInput]]:
    """Every other input of each kind, in their order."""
    return list(inputs[::2]), list(inputs[1::2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quality", type=Path)
    parser.add_argument("speed", type=Path)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--each", type=int, default=EACH, help="inputs of each kind of work")
    parser.add_argument("--threads", type=int, default=2, help="of the engine; 1 on a busy machine")
    options = parser.parse_args()
    options.answers.mkdir(parents=True, exist_ok=True)
    workload = load_workload(write_workload(options.answers / "workload.jsonl", options.each))
    quality, speed = (
        asked(path, workload, options.answers, options.threads) for path in (options.quality, options.speed)
    )
    scores = {one.input_id: min(token.logprob for token in one.tokens) for one in speed.answers if one.tokens}
    inputs = routed_inputs(input_facts(workload), quality, speed, scores)
    kinds = {tag: [item for item in inputs if tag in item.tags] for tag in workload.tags}
    for kind, items in kinds.items():
        passed = [sum(getattr(item, name) for item in items) for name in ("quality_passed", "speed_passed")]
        print(f"{kind:16} {len(items):4} inputs, passed {passed[0]:3} and {passed[1]:3}", flush=True)
    rows = []
    for name, (made, judged) in zip(("first", "second"), (halves(inputs), halves(inputs)[::-1]), strict=True):
        advice = advise(made, np.random.default_rng(0))
        print(f"made from the {name} half: {advice.sentence}")
        for tagged in (True, False):
            rows.append({"made_from": name, "tags_told": tagged, **outcome(judged, advice, tagged=tagged)})
            print(f"  on the other half, tags {'told' if tagged else 'guessed'}: {rows[-1]}", flush=True)
    whole = advise(inputs, np.random.default_rng(0))
    print(f"200 random halves of all {len(inputs)}: {whole.sentence}")
    everything = sum(item.quality_s for item in inputs) / sum(item.speed_s for item in inputs) - 1
    told: dict[str, object] = {
        "levels": [quality.level, speed.level],
        "quality_for_all_extra_cost": round(everything, 3),
    }
    for how, found in (("tags", whole.by_tag), ("escalation", whole.by_escalation)):
        if found is not None:
            recovered = None if math.isnan(found.recovered) else round(found.recovered, 3)
            gained = {"gained": round(found.gained, 4), "gained_low": round(found.gained_low, 4)}
            told[how] = {"recovered": recovered, **gained, "extra_cost": round(found.extra_cost, 3)}
    print(json.dumps({"setting": gateway_setup.setting(), **told, "rows": rows}))


if __name__ == "__main__":
    main()
