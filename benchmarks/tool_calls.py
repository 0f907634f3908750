"""Claim: levels of one model differ in the tool calls that they make, and the faults of each are named.

Every file is shown four calls with their results and asked for another, once for each city, through its own chat
template and the engine's own parser: name and arguments must be the wanted ones. The first file is the reference. A
model of any size will do whose chat template has a place for tools; --template gives one to a file that has none.

    scripts/bench tool_calls REFERENCE.gguf LEVEL.gguf ... [--calls 30] [--threads 2]
    scripts/bench tool_calls --template MODEL.gguf OUT.gguf
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bitladder.describe.workload import Workload
from bitladder.describe.workload_file import parse_workload
from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.records.evaluation import LevelAnswers, Speed
from bitladder.stages.as_deployed import refuse_unheard_tools
from bitladder.stages.evaluate import answer_workload, compare, judge_answers, level_answers

CITIES = (
    "Paris", "Lima", "Cairo", "Oslo", "Quito", "Dakar", "Hanoi", "Sofia", "Minsk", "Accra",
    "Turin", "Leeds", "Osaka", "Perth", "Delhi", "Kyoto", "Malmo", "Porto", "Tunis", "Basel",
    "Riga", "Split", "Ghent", "Tampa", "Fargo", "Davos", "Kazan", "Pune", "Cork", "Graz",
)  # fmt: skip
SHOWN = (("Berlin", 2), ("Rome", 5), ("Bergen", 1), ("Bern", 4))
"""Calls that stand before the question: a model of 135 million weights makes none that it was not shown."""
TEMPLATE = Path(__file__).parents[1] / "scripts" / "tools.jinja"


def calls(number: int) -> Workload:
    """A call for each city, after four others."""

    def question(city: str, days: int) -> dict[str, object]:
        return {"role": "user", "content": f"Weather in {city} for {days} days?"}

    def shown(city: str, days: int) -> list[dict[str, object]]:
        arguments = {"city": city, "days": days}
        made: dict[str, object] = {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": arguments}]}
        return [question(city, days), made, {"role": "tool", "content": "ok"}]

    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["city", "days"]}
    inputs = []
    for place, city in enumerate(CITIES[:number]):
        wanted = {"name": "get_weather", "arguments": {"city": city, "days": place % 6 + 2}, "exact": True}
        messages = [*(one for pair in SHOWN for one in shown(*pair)), question(city, place % 6 + 2)]
        inputs.append({"id": city, "messages": messages, "max_tokens": 48, "expect": {"tool_call": wanted}})
    tool = {"name": "get_weather", "description": "Weather of a city", "parameters": parameters}
    text = json.dumps({"tools": [tool], "inputs": inputs})
    return parse_workload(text, source="calls.json", read_file=str, json=True)


def with_template(source: Path, out: Path, template: Path) -> int:
    """Write a file with another chat template; gives the exit code."""
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template-file", str(template)]
    return subprocess.run([*command, str(source), str(out)], check=False).returncode


def answered(path: Path, workload: Workload, threads: int) -> LevelAnswers:
    """One file's answers, judged."""
    with LlamaServer(Launch(path, n_ctx=1024, n_parallel=1, threads=threads)) as server:
        refuse_unheard_tools(workload, server)
        made = judge_answers(workload, answer_workload(server, workload, logprobs=0))
    return level_answers(path.stem, made, Speed(float("nan"), float("nan"), float("nan")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--calls", type=int, default=len(CITIES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--template", action="store_true", help="write the first file with a place for tools")
    options = parser.parse_args()
    if options.template:
        source, out = options.files
        raise SystemExit(with_template(source, out, TEMPLATE))
    workload = calls(options.calls)
    reference = answered(options.files[0], workload, options.threads)
    passes = sum(answer.passed for answer in reference.answers)
    print(f"{reference.level}: {passes} of {len(reference.answers)} calls right (the reference)", flush=True)
    for path in options.files[1:]:
        result = compare(reference, answered(path, workload, options.threads), workload)
        faults = {fault.fault: [fault.level, fault.reference] for fault in result.faults}
        row = {"level": result.level, "right": result.passes, "of": result.inputs, "faults": faults}
        row |= {
            "low": result.pass_low,
            "high": result.pass_high,
            "lost": len(result.lost),
            "gained": len(result.gained),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
