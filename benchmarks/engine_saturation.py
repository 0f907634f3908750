"""Claim: a workload takes at most 1.3 times what the engine itself needs for the same tokens at the same
concurrency.

The engine's own pace is measured by its batch benchmark's method (llama-batched-bench): as many requests as
there are slots, all of one length, sent at once through the engine's plainest interface, no chat template, no
probabilities; prompts of the workload's mean length, answers of its mean length. The workload then runs
through Bitladder, template, probabilities, judging and all, and its wall time is compared with its tokens at
that pace. Both are repeated in turn, and medians compared.

    scripts/bench engine_saturation MODEL.gguf [--parallel 4] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitladder.engines.base import Launch
from bitladder.engines.llama import LlamaServer
from bitladder.files.workloads import load_workload
from bitladder.stages.evaluate import answer_workload, judge_answers


def own_pace(server: LlamaServer, prompt: int, answer: int, rounds: int) -> float:
    """Seconds per request when every slot is busy with requests of one length."""
    tokens = server.tokenize("The harbour was quiet in the early morning. " * 60)
    began = time.monotonic()
    with ThreadPoolExecutor(server.parallel) as pool:
        jobs = [
            pool.submit(server.time_tokens, tokens[start : start + prompt], max_tokens=answer)
            for start in range(rounds * server.parallel)
        ]
        for job in jobs:
            job.result()
    return (time.monotonic() - began) / (rounds * server.parallel)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    workload = load_workload()
    with LlamaServer(Launch(options.model, n_ctx=1024, n_parallel=options.parallel, threads=options.threads)) as server:
        answers = answer_workload(server, workload)  # warms up, and tells how many tokens there are
        prompt = round(statistics.fmean(answer.prompt_tokens for answer in answers))
        answer = round(statistics.fmean(answer.completion_tokens for answer in answers))
        walls, paces = [], []
        for _ in range(options.repeats):
            paces.append(own_pace(server, prompt, answer, rounds=-(-len(answers) // options.parallel)) * len(answers))
            began = time.monotonic()
            judge_answers(workload, answer_workload(server, workload))
            walls.append(time.monotonic() - began)
    wall, pace = statistics.median(walls), statistics.median(paces)
    print(
        f"{len(answers)} inputs, {prompt} prompt and {answer} answer tokens each on average, "
        f"{options.parallel} slots, {options.threads} threads\n"
        f"workload {wall:.2f} s, the engine's own pace {pace:.2f} s: {wall / pace:.2f} (claim: at most 1.3)"
    )
    print(json.dumps({"workload_s": walls, "engine_s": paces, "ratio": wall / pace}))


if __name__ == "__main__":
    main()
