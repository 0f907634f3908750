"""A killed job of every kind goes on where it was, and ends as one that nobody disturbed.

The command, in a process of its own (commands_forked.py), dies of SIGKILL at a chosen moment (dying.py) and is called
again. That it did not start anew is seen from outside: in the layers that its progress names, or in the bytes that it
writes.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digest
import make
import pytest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A call; where it is killed (``WHAT:COUNT`` of the hook); and a line that only one that starts anew prints, or
    what a job that goes on prints."""

    words: str
    kill: str
    anew: str = ""
    again: str = ""


CALIBRATION = "--text $S/calibration.txt"
MEASURING = "--text $S/measuring-0.txt --text $S/measuring-1.txt --text $S/measuring-2.txt"
ENGINE = "--workload $S/workload.yaml --ctx 512 --out $O/run"
RUN = f"run $S/small.gguf --full --levels Q8_0,Q4_K_M --imatrix none {MEASURING} {ENGINE}"
"""Everything is done, whatever speeds say."""
JOBS = {
    "GGUF levels": Job("quantize $S/small.gguf --to Q8_0,Q4_K_M,Q2_K --imatrix none --out $O", ".partial.journal:40"),
    "split levels": Job(
        "quantize $S/small.gguf --to Q8_0 --imatrix none --split-max-size 600KB --out $O", ".partial.journal:20"
    ),
    "checkpoints of every method": Job(
        f"quantize $S/small.gguf --to GPTQ-4bit-g64,AWQ-4bit-g64,INT8-W8A8-smooth {CALIBRATION} --out $O",
        "layer 3 of 3:1", "layer 1 of 3"
    ),
    "folded level and its matrix": Job(
        f"quantize $S/small.gguf --to AWQ-Q4_K_M {CALIBRATION} --out $O", "layer 3 of 3:1", "layer 1 of 3"
    ),
    "fitted level": Job(
        f"quantize $S/small.gguf --to GPTQ-Q4_K_M --effort fast {CALIBRATION} --out $O",
        "fitting layer 3 of 3:1", "fitting layer 1 of 3"
    ),
    "walk that measures": Job(
        f"measure $S/small.gguf --levels Q8_0,Q4_K_M --imatrix none {MEASURING}",
        "walk: layer 3 of 3:1", "walk: layer 1 of 3"
    ),
    "run, between levels": Job(RUN, "Q8_0: answered:1", "walk: layer 1", again="Reused: fidelity of Q8_0, Q4_K_M"),
    "importance matrix": Job(
        f"imatrix $S/small.gguf {CALIBRATION} --out $O/made.gguf", "layer 3 of 3:1", "layer 1 of 3",
    ),
    "weighing of a recipe": Job(
        f"recipe $S/small.gguf --bpw 5 {CALIBRATION}", "sensitivity: layer 3 of 3:1", "sensitivity: layer 1 of 3",
    ),
    "checking of a recipe": Job(
        f"recipe $S/small.gguf --bpw 5 {CALIBRATION}", "walk: layer 3 of 3:1", "sensitivity: layer 1 of 3"
    ),
}  # fmt: skip
START_ANEW = {"weighing of a recipe", "checking of a recipe"}
"""Kinds of jobs that keep where they are every 30 seconds at most, and here take less."""


@dataclass(frozen=True)
class Call:
    code: int
    record: Any
    told: str
    files: dict[str, Any]
    bytes_written: int


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    subprocess.run([sys.executable, str(HERE / "models.py"), str(folder), "small"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def forked() -> Iterator[Callable[..., int]]:
    """Runs a command in a process of its own; returns its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(make.ROOT / "src")}
    environment.pop("BITLADDER_STORE", None)
    with subprocess.Popen(
        [sys.executable, str(HERE / "commands_forked.py")], env=environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip

        def run(**asked: Any) -> int:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


def call(forked: Callable[..., int], job: Job, sources: Path, work: Path, *, kill: bool = False) -> Call:
    """The job in a world beneath ``work``."""
    out = work / "o"
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        "BITLADDER_DATA": str(work / "data"),
        "BITLADDER_CACHE": str(work / "cache"),
        "GOLDEN_MINUTES": "layer",
        "GOLDEN_WRITTEN": str(work / "written"),
        "GOLDEN_KILL": job.kill if kill else "",
    }
    words = [word.replace("$S", str(sources)).replace("$O", str(out)) for word in shlex.split(job.words)]
    for name in ("out", "err"):
        (work / name).unlink(missing_ok=True)
    code = forked(words=[*words, "--threads", "1"], environment=environment, folder=str(work))
    printed, told = ((work / name).read_text() for name in ("out", "err"))
    written = work / "written"
    kept = out / "run" / "run.json"
    record = digest.steady(json.loads(kept.read_text()), {str(work): "$W"}) if kept.exists() else printed
    return Call(
        code,
        record,
        told,
        digest.of_folder(out, sketched=False) if code == 0 else {},
        int(written.read_text()) if written.exists() else 0,
    )


@pytest.fixture(scope="session")
def three(forked, sources, tmp_path_factory):
    """By kind of job: an undisturbed call, a killed one, and the one that goes on."""
    undisturbed: dict[str, Call] = {}
    done: dict[str, tuple[Call, Call, Call]] = {}

    def calls(kind: str) -> tuple[Call, Call, Call]:
        job = JOBS[kind]
        if job.words not in undisturbed:
            whole = undisturbed[job.words] = call(forked, job, sources, tmp_path_factory.mktemp("whole"))
            assert whole.code == 0, whole.told
        if kind not in done:
            cut = tmp_path_factory.mktemp("cut")
            killed = call(forked, job, sources, cut, kill=True)
            done[kind] = undisturbed[job.words], killed, call(forked, job, sources, cut)
        return done[kind]

    return calls


@pytest.mark.parametrize("kind", JOBS)
def test_a_killed_job_called_again_ends_as_if_undisturbed(three, kind):
    whole, killed, again = three(kind)
    assert killed.code == -signal.SIGKILL, killed.told
    assert again.code == 0, again.told
    assert again.files == whole.files
    assert _numbers(again.record) == _numbers(whole.record)


def _numbers(record: Any) -> Any:
    """What a call tells of its product; words about the call itself change when part of it is reused."""
    if isinstance(record, dict):
        return {key: record[key] for key in ("decision", "fidelities", "results", "answers")}
    return record.splitlines() if "KL mean" in record or "recipe" in record else None


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.xfail(reason="too short to keep anything", strict=False))
        if kind in START_ANEW
        else kind
        for kind in JOBS
    ],
)
def test_a_killed_job_does_not_start_anew(three, kind):
    job = JOBS[kind]
    whole, _, again = three(kind)
    if job.anew:
        assert job.anew in whole.told
        assert job.anew not in again.told
    else:
        assert again.bytes_written < 0.8 * whole.bytes_written
    assert job.again in again.told
