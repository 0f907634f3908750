"""Claim: a Ray cluster of 32 workers is busy 90% of the time with the units of a 70B model's importance matrix, and
with those of three GPTQ levels side by side (`--jobs 3`; of one level alone 79%, of two 88%).

    scripts/bench simulated_cluster [--nodes 8] [--each 4] [--faster 10] [--jobs 3]

A real Ray cluster on this machine: a raylet for each node, a process for each worker, our executor. Units sleep for as
long as the cost model of `plan --job` says that they take on a node of 16 cores (`plan/scale.layer_phases`), divided by
`--faster`, so that what Ray takes of a unit weighs as many times as much; phases wait for one another as in a walk, but
for the source's pass, which stands in line behind the last codes of the layer before.
States and sums are not moved. Efficiency is the seconds of all units over workers times the time that passed, from the
first unit on warm workers to the last; beside it stands what the phases themselves allow (units that cannot be cut).
`--jobs N` lets so many levels go through the cluster side by side, as N commands would.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import heapq
import json
import sys
import time

from bitladder.executors import Executor, Started, Task
from bitladder.executors.needs import Needs
from bitladder.executors.on_ray import connect
from bitladder.files.catalogue import model_named
from bitladder.plan.scale import CPU_FLOPS, ScaleJob, Workers, layer_phases

MODEL, CORES = "meta-llama/Llama-3.3-70B-Instruct", 16


def sleeping() -> Task:
    """A task whose units are seconds; a class of no module, for workers cannot import this file."""

    class Sleeping:
        threads = 1

        def compute(self, lane: object, unit: float, *held: object) -> tuple[float, None]:  # noqa: ARG002
            import time

            time.sleep(unit)
            return unit, None

    return Sleeping()


def awaited(units: list[float], shards: int) -> int:
    """How many of a phase's units the next phase waits for: behind codes the source's shards stand, which go on."""
    return len(units) - shards if len(units) > shards else len(units)


def walk(cluster: Executor, task: Task, phases: list[list[float]], shards: int) -> None:
    """Phase after phase; what goes on is waited for with the next one."""
    going_on: list[Started] = []
    for units in phases:
        begun, count = [cluster.start(task, unit) for unit in units], awaited(units, shards)
        for one in [*begun[:count], *going_on]:
            one.result()
        going_on = begun[count:]


def least_seconds(phases: list[list[float]], workers: int, shards: int) -> float:
    """What the same takes where starting a unit costs nothing."""
    free, now, going_on = [0.0] * workers, 0.0, 0.0
    for units in phases:
        ends = [now]
        for unit in units:
            ends.append(max(now, heapq.heappop(free)) + unit)
            heapq.heappush(free, ends[-1])
        count = awaited(units, shards)
        now, going_on = max(*ends[: count + 1], going_on), max(ends[count:])
    return max(now, going_on)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--faster", type=float, default=10.0)
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    from ray.cluster_utils import Cluster

    node = {"num_cpus": options.each, "object_store_memory": 80 << 20}
    ray_cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    for _ in range(options.nodes):
        ray_cluster.add_node(**node)
    workers = options.nodes * options.each
    rate = CORES * CPU_FLOPS
    shape = Workers("nodes of 16 cores", workers, 1, rate, 1 << 40, 4, cores=CORES, host_flops=rate, is_gpu=False)
    model = model_named(MODEL).whole()
    rows = []
    with connect(ray_cluster.address, "cpu", Needs()) as cluster:
        task = sleeping()
        walk(cluster, task, [[2.0] * workers] * 2, options.shards)  # every process has started
        for job in (ScaleJob.CALIBRATE, ScaleJob.GPTQ):
            phases = [
                [unit / options.faster for unit in phase]
                for layer in range(options.layers)
                for phase in layer_phases(model, layer, job, shape, tokens=options.shards * 4096)
            ]
            one = sum(sum(phase) for phase in phases)
            whole, alone = options.jobs * one, one / (workers * least_seconds(phases, workers, options.shards))
            began = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                walks = [pool.submit(walk, cluster, task, phases, options.shards) for _ in range(options.jobs)]
                for begun in walks:
                    begun.result()
            seconds = time.perf_counter() - began
            row = {
                "job": job,
                "units": options.jobs * sum(len(phase) for phase in phases),
                "unit_s": round(max(unit for phase in phases for unit in phase), 2),
                "seconds": round(seconds, 1),
                "efficiency": round(whole / (workers * seconds), 3),
                "one_alone_at_most": round(alone, 3),
            }
            rows.append(row)
            print(row, flush=True)
    ray_cluster.shutdown()
    print(json.dumps({"workers": workers, "faster": options.faster, "jobs": options.jobs, "rows": rows}))
    return int(rows[0]["efficiency"] < 0.9)


if __name__ == "__main__":
    sys.exit(main())
