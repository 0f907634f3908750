"""Every path that computes on a GPU, against the CPU's numbers, and timed (scripts/acceptance-gpu).

A check computes one thing on the CPU and on the device and compares: bytes where they must be equal, else the largest
or a mean difference with the tolerance beside it. What is short runs twice on the device, and the second run counts,
because the first loads kernels. What comes after ``--budget`` seconds is not run, and fails the whole.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "src", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import tiny_models  # noqa: E402
from bitladder.describe.windows import Window  # noqa: E402
from bitladder.executors.devices import Devices  # noqa: E402
from bitladder.files.gguf import GgufFile  # noqa: E402
from bitladder.formats.recipes import is_quantizable  # noqa: E402
from bitladder.formats.tensors import TensorInfo  # noqa: E402
from bitladder.kernels import dequantize, gptq, gpu, quantize  # noqa: E402
from bitladder.kernels.codes import grid_of  # noqa: E402
from bitladder.kernels.feedback import chunk_of, quantize_with_feedback  # noqa: E402
from bitladder.kernels.gptq_device import apply_on  # noqa: E402
from bitladder.kernels.rows import AFFINE, SCALE  # noqa: E402
from bitladder.levels.checkpoints import parse_checkpoint  # noqa: E402
from bitladder.records.recipe import Recipe  # noqa: E402
from bitladder.stages.calibrate import Calibration, Reading  # noqa: E402
from bitladder.stages.feedback import write_with_feedback  # noqa: E402
from bitladder.stages.fidelity import made_candidates, walk  # noqa: E402
from bitladder.stages.imatrix import importance_matrix  # noqa: E402
from bitladder.stages.sensitivity import BlockTypes, weigh  # noqa: E402
from bitladder.stages.write_levels import quantize_levels  # noqa: E402
from bitladder.walk.checkpoint_walk import Settings  # noqa: E402
from bitladder.walk.driver import Member, Stream, forward  # noqa: E402
from bitladder.walk.feedback import FeedbackSettings  # noqa: E402
from bitladder.walk.layers import LayeredModel  # noqa: E402
from bitladder.walk.states import batches_of  # noqa: E402
from bitladder.walk.weights import FileWeights  # noqa: E402

BUDGET = 420.0
LEVELS = ("GPTQ-4bit-g32", "AWQ-4bit-g32", "INT8-W8A8-smooth")
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_hidden_layers": 4, "max_position_embeddings": 512, "initializer_range": 0.02}  # fmt: skip


@dataclass
class Check:
    """What came of one path."""

    name: str
    compared: str
    difference: float
    tolerance: float
    cpu_s: float
    device_s: float
    rate: str = ""
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the device agrees; NaN does not."""
        return not self.error and self.difference <= self.tolerance


@dataclass
class Given:
    """What checks compute with."""

    device: str
    small: bool
    source: Path
    checkpoint: Path
    windows: list[Window]
    folder: Path

    def take(self, name: str) -> Path:
        """A fresh folder."""
        place = self.folder / name
        place.mkdir(parents=True)
        return place


def timed(device: str, work: Callable[..., Any], /, *given: Any, repeats: int = 1, **options: Any) -> tuple[float, Any]:
    """Seconds of the fastest run, and what came of the last."""
    best, found = float("inf"), None
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        found = work(*given, **options)
        wait(device)
        best = min(best, time.perf_counter() - began)
    return best, found


def wait(device: str) -> None:
    """Until the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def relative(found: Any, wanted: Any) -> float:
    """The largest difference as a share of the largest value."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def differing(found: Any, wanted: Any) -> float:
    """The share of entries that differ."""
    return float(np.mean(np.asarray(found) != np.asarray(wanted)))


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Weights."""
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def correlated(columns: int, tokens: int) -> np.ndarray:
    """Inputs of few directions."""
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((tokens, 16)) @ rng.standard_normal((16, columns))
    return (mixed + 0.3 * rng.standard_normal((tokens, columns))).astype(np.float32)


def block_formats(given: Given) -> Iterator[Check]:
    """Encoding and decoding of every block format."""
    weights = matrix(8 if given.small else 2048, 512 if given.small else 4096)
    counted = np.abs(matrix(1, weights.shape[1], 1))[0]
    for qtype in ("IQ4_NL", "Q4_K", "Q5_0") if given.small else sorted({*AFFINE, *SCALE}):
        options = {"importance": counted, "effort": "fast" if given.small else "good"}
        here, wanted = timed("cpu", quantize, weights, qtype, **options)
        there, found = timed(given.device, quantize, weights, qtype, repeats=2, device=given.device, **options)
        rate = f"{weights.size / there / 1e6:.1f} M weights/s"
        yield Check(f"encode {qtype}", "bytes that differ", differing(found, wanted), 0.0, here, there, rate)
        data = torch.from_numpy(wanted).to(given.device)
        here, wanted = timed("cpu", dequantize, wanted, qtype)
        there, found = timed(given.device, gpu.dequantize, data, qtype, repeats=2)
        rate = f"{weights.size / there / 1e6:.0f} M weights/s"
        different = differing(found.cpu().numpy(), wanted)
        yield Check(f"decode {qtype}", "weights that differ", different, 0.0, here, there, rate)


def gptq_codes(given: Given) -> Iterator[Check]:
    """Codes with feedback on a plain grid, and inside blocks."""
    rows, columns = (16, 256) if given.small else (4096, 4096)
    x = correlated(columns, 2 * columns)
    weights, gram = matrix(rows, columns), x.T @ x
    factor = gptq.prepare(gram, damp=0.01, together=chunk_of(columns))
    grid = grid_of(quantize(weights, "Q4_K", effort="fast"), "Q4_K")
    here, (codes, cost) = timed("cpu", gptq.apply, factor, weights, grid)
    there, (found, found_cost) = timed(given.device, apply_on(given.device), factor, weights, grid, repeats=2)
    rate = f"{weights.size / there / 1e6:.1f} M weights/s"
    yield Check("GPTQ codes", "codes that differ", differing(found, codes), 1e-2, here, there, rate)
    yield Check("GPTQ cost", "relative", relative(found_cost.sum(), cost.sum()), 1e-3, here, there)
    energies = (x * x).sum(0)
    for qtype in ("Q4_K", "IQ4_XS"):
        options = {"hessian": gram, "importance": energies, "effort": "fast"}
        here, wanted = timed("cpu", quantize_with_feedback, weights, qtype, factor, **options)
        there, fed = timed(
            given.device, quantize_with_feedback, weights, qtype, factor, repeats=2, device=given.device, **options
        )
        rate = f"{weights.size / there / 1e6:.1f} M weights/s"
        yield Check(f"feedback {qtype}", "cost, relative", relative(fed.cost, wanted.cost), 1e-2, here, there, rate)


def walked(given: Given, device: str) -> np.ndarray:
    """States that leave the last layer."""
    with GgufFile.open(given.source) as file:
        weights = FileWeights(file)
        stream = Stream(
            LayeredModel(file.model, weights, device=device), [Member(weights)], batches_of(given.windows),
            state_bytes=1 << 32,
        )  # fmt: skip
        forward([stream], lambda *_: None)
        return stream.states_of(0).everything.numpy().copy()


def gathered(given: Given, device: str) -> dict[str, np.ndarray]:
    """An importance matrix's vectors."""
    with GgufFile.open(given.source) as file:
        return dict(importance_matrix(file, given.windows, device=device, half=False).vectors())


def weighed(given: Given, device: str) -> np.ndarray:
    """Predicted losses of every tensor."""
    with GgufFile.open(given.source) as file:
        table = weigh(file, given.windows, device=device, half=False, choices=OneType()).table
    return np.array([one.plain for own in table.losses.values() for one in own])


def measured(given: Given, device: str) -> np.ndarray:
    """KL of two levels."""
    with GgufFile.open(given.source) as file:
        made = made_candidates(file, ["Q8_0", "Q4_0"], effort="fast", device=device)
        return np.array([one.kl_mean for one in walk(file, made, given.windows, device=device)])


def walks(given: Given) -> Iterator[Check]:
    """States after all layers; importance; losses of types; KL of levels."""
    tokens = sum(len(window.tokens) for window in given.windows)
    here, wanted = timed("cpu", walked, given, "cpu")
    there, found = timed(given.device, walked, given, given.device, repeats=2)
    with GgufFile.open(given.source) as file:
        per_token = 2 * sum(one.elements for one in file.model.tensors if one.name.startswith("blk."))
    rate = f"{tokens / there:,.0f} tokens/s, {tokens * per_token / there / 1e12:.2f} TFLOP/s"
    yield Check("states after all layers", "relative", relative(found, wanted), 1e-3, here, there, rate)

    here, wanted = timed("cpu", gathered, given, "cpu")
    there, found = timed(given.device, gathered, given, given.device, repeats=2)
    different = max(relative(found[name], wanted[name]) for name in wanted)
    yield Check("importance matrix", "relative", different, 1e-3, here, there, f"{tokens / there:,.0f} tokens/s")

    here, wanted = timed("cpu", weighed, given, "cpu")
    there, found = timed(given.device, weighed, given, given.device)
    yield Check("losses of types", "relative", relative(found, wanted), 1e-2, here, there)

    here, wanted = timed("cpu", measured, given, "cpu")
    there, found = timed(given.device, measured, given, given.device)
    yield Check("KL of levels", "relative", relative(found, wanted), 1e-2, here, there)


def calibrated(given: Given, level: str, out: Path, device: str, executor: Devices | None = None) -> dict[str, Any]:
    """Losses of a level's matrices, by name."""
    with GgufFile.open(given.source) as file:
        job = Calibration(
            file, [parse_checkpoint(level)], Reading(given.windows), out_dir=out, name="random",
            checkpoint=given.checkpoint, settings=Settings(device=device, half=False), executor=executor,
        )  # fmt: skip
        [report] = job.run().checkpoints
    return {one.name: one.loss for one in report.linears}


def fitted(given: Given, device: str, out: Path) -> float:
    """The mean loss of a level with error feedback."""
    with GgufFile.open(given.source) as file:
        qtypes = {one.name: "Q4_0" if is_quantizable(one) else one.qtype for one in file.model.tensors}
        recipe = Recipe("test", "llama", qtypes, 0, float("nan"), 0.25)
        settings = FeedbackSettings(effort="fast", device=device, half=False)
        made = write_with_feedback(file, recipe, out, given.windows, settings=settings)
    return float(np.mean([one.loss for one in made.losses]))


def written(given: Given, device: str, out: Path) -> bytes:
    """Two GGUF levels."""
    with GgufFile.open(given.source) as file:
        return b"".join(one.path.read_bytes() for one in quantize_levels(file, ["Q4_K_M", "Q5_0"], out, device=device))


def levels(given: Given) -> Iterator[Check]:
    """Checkpoint levels, fitted levels, GGUF levels, and a job that CPU and device share."""
    for level in LEVELS:
        places = [given.take(f"{level}-{number}") for number in range(2)]
        here, wanted = timed("cpu", calibrated, given, level, places[0], "cpu")
        there, found = timed(given.device, calibrated, given, level, places[1], given.device)
        pairs = [(found[name], wanted[name]) for name in wanted]
        yield Check(level, "loss, relative", relative(*map(np.mean, zip(*pairs, strict=True))), 2e-2, here, there)
    with Devices(["cpu", given.device]) as both:
        place = given.take("shared")
        there, shared = timed(given.device, calibrated, given, LEVELS[0], place, "cpu", both)
    with tempfile.TemporaryDirectory() as other:
        here, alone = timed("cpu", calibrated, given, LEVELS[0], Path(other), "cpu")
    mean = [float(np.mean(list(one.values()))) for one in (shared, alone)]
    yield Check(f"{LEVELS[0]} on cpu,{given.device}", "loss, relative", relative(*mean), 2e-2, here, there)

    places = [given.take(f"fitted-{number}") for number in range(4)]
    here, wanted = timed("cpu", fitted, given, "cpu", places[0])
    there, found = timed(given.device, fitted, given, given.device, places[1])
    yield Check("FB-Q4_0", "loss, relative", relative(found, wanted), 2e-2, here, there)

    here, wanted = timed("cpu", written, given, "cpu", places[2])
    there, found = timed(given.device, written, given, given.device, places[3])
    yield Check("write Q4_K_M and Q5_0", "files that differ", float(found != wanted), 0.0, here, there)


class OneType(BlockTypes):
    """What is encoded does not depend on the device."""

    def of(self, info: TensorInfo) -> tuple[str, ...]:
        """As ``Choices``."""
        return ("Q4_0",) if is_quantizable(info) else ()


GROUPS = (block_formats, gptq_codes, walks, levels)


def made(folder: Path, *, small: bool) -> tuple[Path, Path]:
    """A model with random weights: its checkpoint folder, and its GGUF."""
    case = tiny_models.CASES["llama"]
    model = tiny_models.make(case, **({} if small else WIDE))
    if not small:  # as wide as real ones, weights must be as small, or states overflow
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("norm.weight"):
                    parameter.mul_(0.1)
    checkpoint = folder / "source"
    model.save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    return checkpoint, tiny_models.write(case, model, folder / "source.gguf")


def run(device: str, *, small: bool, budget: float = BUDGET) -> dict[str, Any]:
    """All checks; what they found, as it is written."""
    torch.backends.cuda.matmul.allow_tf32 = False
    began, found = time.perf_counter(), list[Check]()
    late: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        checkpoint, source = made(place, small=small)
        rng = np.random.default_rng(0)
        length = 64 if small else 512
        windows = [Window(f"text {n // 4}", rng.integers(0, tiny_models.N_VOCAB, length)) for n in range(16)]
        given = Given(device, small, source, checkpoint, windows, place)
        for group in GROUPS:
            checks = group(given)
            while True:
                if time.perf_counter() - began > budget:
                    late.append(group.__name__)
                    break
                check = _next(group.__name__, checks)
                if check is None:
                    break
                found.append(check)
                print(line(check), flush=True)
                if check.error:
                    break
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "device": device,
        "name": name,
        "torch": torch.__version__,
        "peak": peak(device, small=small),
        "seconds": time.perf_counter() - began,
        "small": small,
        "not_run": late,
        "passed": not late and all(check.passed for check in found),
        "checks": [asdict(check) | {"passed": check.passed} for check in found],
    }


def _next(group: str, checks: Iterator[Check]) -> Check | None:
    """The next check of a group; a path that fails is one of the things to find out."""
    try:
        return next(checks, None)
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Check(group, "", float("nan"), 0.0, 0.0, 0.0, error=message)


def peak(device: str, *, small: bool) -> dict[str, float]:
    """Float32 products and copies to the device at full speed, to hold the rates against."""
    n = 256 if small else 8192
    a = torch.full((n, n), 0.5, device=device)
    seconds, _ = timed(device, torch.mm, a, a, repeats=5)
    host = torch.ones(1 << (16 if small else 26))
    copy, _ = timed(device, host.to, device, repeats=3)
    return {"f32_tflops": 2 * n**3 / seconds / 1e12, "to_device_gb_s": host.nbytes / copy / 1e9}


def line(check: Check) -> str:
    """A row of the table."""
    verdict = "yes" if check.passed else f"NO {check.error}".strip()
    faster = f"{check.cpu_s / check.device_s:.1f}" if check.device_s else ""
    return (
        f"| {check.name} | {check.compared} | {check.difference:.2g} | {check.tolerance:g} | {verdict} "
        f"| {check.cpu_s:.3f} | {check.device_s:.3f} | {faster} | {check.rate} |"
    )


def table(found: dict[str, Any]) -> str:
    """All of it in Markdown."""
    rows = [line(Check(**{key: one[key] for key in one if key != "passed"})) for one in found["checks"]]
    late = f"\nNot run for want of time: {', '.join(found['not_run'])}.\n" if found["not_run"] else ""
    dry = "\nA dry run: tiny sizes, whose times say nothing.\n" if found["small"] else ""
    return "\n".join(
        [
            f"# {found['name']} ({found['device']}), torch {found['torch']}",
            "",
            f"{'All agree' if found['passed'] else 'NOT all agree'}; {found['seconds']:.0f} s. Products of float32 "
            f"matrices {found['peak']['f32_tflops']:.1f} TFLOP/s, to the device {found['peak']['to_device_gb_s']:.1f} "
            "GB/s.",
            dry + late,
            "| path | compared | difference | allowed | agrees | CPU, s | device, s | faster | rate |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where the device agrees with the CPU everywhere, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--budget", type=float, default=BUDGET)
    options = parser.parse_args(arguments)
    gpu.check_device(options.device)
    found = run(options.device, small=options.small, budget=options.budget)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "gpu.md").write_text(table(found))
    print(f"{options.out / 'gpu.md'}: {'all agree' if found['passed'] else 'NOT all agree'}")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
