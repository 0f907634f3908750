"""Write golden.json: what today's commands make of the tiny models.

    python tests/golden/make.py            of the checkout it lies in
    python tests/golden/make.py NAME ...   of these commands alone, on the host that the others were made on

Only for a change of bytes or figures that is meant; the change says so in its message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = HERE / "golden.json"
NOTE = (
    "Made by tests/golden/make.py. exact: a hash of each file's header and tensors, the same on every processor. "
    "calibrated: the same hash, and for other hosts than 'host' a sketch. figures: per level KL, perplexity ratio, "
    "top-1. records: hashes."
)
FIGURES = ("kl_mean", "kl_median", "ppl_ratio", "top1")


def results(
    work: Path,
    *,
    source: Path = ROOT,
    python: str = sys.executable,
    models: Path | None = None,
    tested: bool = False,
    names: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What the commands of one checkout make, each in its folder beneath ``work``, in a process of their own.

    ``models``: the folder of sources, made where it is not there.
    """
    work.mkdir(parents=True, exist_ok=True)
    models, out = models or work / "sources", work / "results.json"
    environment = {
        **os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("BITLADDER_STORE", None)
    if not models.exists():
        subprocess.run([sys.executable, str(HERE / "models.py"), str(models)], check=True, stdout=subprocess.DEVNULL)
    words = [python, str(HERE / "runner.py"), str(models), str(work / "made"), str(out), *names]
    subprocess.run([*words, *(["--tested"] if tested else [])], check=True, env=environment)
    found: dict[str, Any] = json.loads(out.read_text())
    if not Path(found["of"]).is_relative_to(source.resolve()):
        raise SystemExit(f"{found['of']} was run, which is not in {source}")
    return found


def _sha(value: Any) -> str:
    sys.path.insert(0, str(HERE))
    import digest

    return digest.sha(json.dumps(value, sort_keys=True).encode())


def _rounded(value: Any) -> Any:
    """Floats to nine digits: the order of a sum's terms may change."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _file(of: dict[str, Any]) -> str:
    return _sha({key: value for key, value in of.items() if key != "sketch"})


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of results."""
    kept: dict[str, Any] = {name: {} for name in ("codes", "exact", "calibrated", "figures", "records", "decisions")}
    for name, one in found["commands"].items():
        kept["codes"][name] = one["code"]
        record = one["written"] or one["record"]
        if any("sketch" in file for file in one["files"].values()):
            kept["calibrated"][name] = {
                path: {"sha": _file(file), **{key: file[key] for key in ("shapes", "sketch") if key in file}}
                for path, file in one["files"].items()
                if not path.startswith("run/")
            }
        elif one["files"]:
            kept["exact"][name] = {path: _file(file) for path, file in one["files"].items()}
        if isinstance(record, dict) and name.startswith("figures"):
            kept["figures"][name] = {row["level"]: {key: row[key] for key in FIGURES} for row in record["levels"]}
        if name.startswith(("plan", "inspect")):
            kept["records"][name] = _sha(_rounded(record))
        if isinstance(record, dict) and "decision" in record:
            decision = record["decision"]
            kept["decisions"][name] = {
                "quality": decision["quality"],
                "outcome": decision["outcome"],
                "verdicts": {one["level"]: one["status"] for one in decision["verdicts"]},
                "lost": {one["level"]: one["lost"] for one in record["results"]},
                "answers": {level["level"]: [a["text"] for a in level["answers"]] for level in record["answers"]},
            }
            kept["figures"][name] = {row["level"]: {key: row[key] for key in FIGURES} for row in record["fidelities"]}
        if isinstance(record, dict) and "recipe" in record and not one["files"]:
            kept["figures"][name] = {"recipe": {key: record["recipe"][key] for key in ("bytes", "bpw", "expected_kl")}}
    return {"note": NOTE, "host": found["host"], **kept}


def main() -> None:
    names = tuple(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        found = compact(results(Path(folder), tested=True, names=names))
    write(renewed(json.loads(GOLDEN.read_text()), found) if names else found)


def renewed(old: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was kept, with what some commands made anew."""
    if found["host"] != old["host"]:
        raise SystemExit(f"golden.json was made on {old['host']}, this is {found['host']}: make all of it anew.")
    kinds = [key for key, value in old.items() if isinstance(value, dict)]
    return {**old, **{kind: {**old[kind], **found[kind]} for kind in kinds}}


def write(kept: dict[str, Any]) -> None:
    """A line for each command, so that a difference of two versions can be read."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items() if not isinstance(value, dict)]
    for key, value in kept.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{rows}\n }}")
    GOLDEN.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
