"""The table of docs/families.md: what each verb does with a tiny checkpoint of each architecture.

Every row of ``tests/tiny_configs.py`` is a checkpoint of random weights, built from transformers' own configuration
class, with a small tokenizer of the kind that its converter reads. Every cell is a command, run as a user would run it;
it works, or it names its reason. Half a minute to two for each row:

    python benchmarks/families.py [NAMES] [--folder DIR] [--out docs/families.md]

What a row gave is kept in DIR, and the page has all that are there: rows can be made one by one, or again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

COLUMNS = {
    "plan": ["plan", "{model}", "--ctx", "256"],
    "convert": ["quantize", "{model}", "--to", "F16", "--imatrix", "none", "--out", "{out}/f16"],
    "K-quants": ["quantize", "{model}", "--to", "Q4_K_M,Q8_0", "--imatrix", "none", "--out", "{out}/k"],
    "importance": ["imatrix", "{model}", "--out", "{out}/importance.gguf", "--text", "{text}"],
    "measure": ["measure", "{model}", "--levels", "Q8_0", "--imatrix", "none", "--text", "{text}"],
    "run": [
        "run", "{model}", "--levels", "Q8_0", "--imatrix", "none", "--text", "{text}", "--workload", "{workload}",
        "--ctx", "256", "--out", "{out}/run",
    ],
    "GPTQ": ["quantize", "{model}", "--to", "GPTQ-4bit-g32", "--text", "{text}", "--out", "{out}/gptq"],
    "recipe": ["recipe", "{model}", "--bpw", "6", "--text", "{text}", "--out", "{out}/recipe"],
}  # fmt: skip
"""Column -> the command that its cells run."""
REASONS = (
    (r"Checkpoint levels of .* cannot be written|codes of \d bits fill|which groups of \d+ do not divide", "layout"),
    (r"converter.*(failed|does not (know|read)|quantized with)", "converter"),
    (r"does not know the tokenizer", "tokenizer"),
    (r"No layers are known|has no place in the layers|has '.*'\.|rotates \d+ of", "layers"),
    (r"KL inf|no fidelity|could not be measured", "layers"),
    (r"engine|llama\.cpp|xllamacpp", "engine"),
)
"""What a message says, and the word for it in the table."""
CAUSE = r"error loading model: (.*)|(GGML_ASSERT.*)|(\b[A-Z]\w*Error: .*)"
"""In the last words of another program: what it could not do."""
INTRODUCTION = """\
# Families

What each verb does with a tiny checkpoint of each architecture: random weights from transformers' own configuration
class, in bfloat16, with names and keys as on the hub and a tokenizer of the kind that the family's converter reads.
Every cell is a command that was run; it works, or its reason is beneath. Rows of 64 weights are too short for blocks of
256, so K-quants fall back to blocks of 32 here. Which of these a model of yours can have, [`plan`](plan.md) says at
once.

Made by `python benchmarks/families.py`, with {versions}.
Converters know a byte-level tokenizer by a hash over its tokens, and none knows a small one: the converter is told
that it is Qwen 2's.

"""
WORKLOAD = """\
inputs:
  - id: one
    prompt: Say yes.
    expect: {max_words: 500}
  - id: two
    prompt: Name a colour.
    expect: {max_words: 500}
"""
SECONDS = 1200


def command(arguments: list[str], log: Path) -> tuple[int, str]:
    """Run the command line in a fork, which has everything imported already: exit code, and what it printed."""
    child = os.fork()
    if child == 0:
        with log.open("w") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            code = 99
            try:
                from bitladder.cli.app import app

                app(arguments, standalone_mode=True)
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124, f"not done after {SECONDS} seconds"


def reason_of(text: str) -> tuple[str, str]:
    """The word for the table, and what was wrong in a sentence."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    at = next((number for number, line in enumerate(lines) if line.startswith("error:")), max(0, len(lines) - 3))
    said = [re.sub(r"\S*/tmp\S*/", "", line.removeprefix("error: ")) for line in lines[at:]]
    message = " ".join(said)
    word = next((word for pattern, word in REASONS if re.search(pattern, message)), "other")
    causes = [found[found.lastindex or 0] for line in said if (found := re.search(CAUSE, line))]
    return word, causes[-1] if causes else re.split(r"(?<=\w)\.(?= |$)", message)[0][:300]


def row_of(name: str, work: Path, texts: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The cells of one architecture, and the message behind each that does not work."""
    from tiny_configs import write_release

    model = work / name
    for old in (model, work / f"{name}-out"):
        shutil.rmtree(old, ignore_errors=True)
    try:
        write_release(name, model)
    except Exception as error:
        return dict.fromkeys(COLUMNS, "transformers"), {"plan": f"{type(error).__name__}: {error}"[:200]}
    cells, messages = {}, {}
    for column, words in COLUMNS.items():
        filled = [word.format(model=model, out=work / f"{name}-out", **texts) for word in words]
        code, text = command(filled, work / f"{name}-{column}.log")
        if code in (0, 3, 4) and "Traceback" not in text:
            cells[column] = "yes"
            continue
        cells[column], messages[column] = reason_of(text)
        if column == "convert":
            rest = [other for other in COLUMNS if other not in cells]
            return {**cells, **dict.fromkeys(rest, cells[column])}, messages
    return cells, messages


def table(rows: dict[str, dict[str, str]], messages: dict[str, dict[str, str]], classes: dict[str, str]) -> str:
    """The page's tables."""
    lines = ["| architecture | class | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, cells in rows.items():
        lines.append(f"| {name} | {classes[name]} | " + " | ".join(cells[column] for column in COLUMNS) + " |")
    works = {column: sum(cells[column] == "yes" for cells in rows.values()) for column in COLUMNS}
    lines.append(f"| of {len(rows)} | | " + " | ".join(str(works[column]) for column in COLUMNS) + " |")
    lines += ["", "## Reasons", "", "| architecture | verbs | reason |", "|---|---|---|"]
    for name, found in messages.items():
        verbs: dict[str, list[str]] = {}
        for column, message in found.items():
            verbs.setdefault(message.replace("|", "/").strip(), []).append(column)
        lines += [f"| {name} | {', '.join(columns)} | {message} |" for message, columns in verbs.items()]
    return "\n".join(lines) + "\n"


def kept(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What rows gave, by name; the last of each counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def page(found: dict[str, dict[str, dict[str, str]]]) -> str:
    """The whole page, of the rows that there are."""
    import transformers

    from bitladder.files.engine_package import ENGINE, engine_version
    from tiny_configs import CONFIGS, class_of, config_of

    versions = f"transformers {transformers.__version__} and {ENGINE} {engine_version()}"
    rows = {name: found[name] for name in CONFIGS if name in found}
    tables = table(
        {name: row["cells"] for name, row in rows.items()},
        {name: row["messages"] for name, row in rows.items()},
        {name: class_of(config_of(name)).__name__ for name in rows},
    )
    others = ", ".join(name for name in CONFIGS if name not in rows)
    rest = f"\n`tests/tiny_configs.py` has more, which were not run for this table: {others}.\n" if others else ""
    return INTRODUCTION.format(versions=versions) + tables + rest


def main() -> None:
    """Build the checkpoints, run the verbs, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/families.md")
    arguments = parser.parse_args()
    import transformers

    from tiny_configs import CONFIGS
    from tiny_tokenizers import converter_that_knows

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with contextlib.ExitStack() as stack:
        work = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["BITLADDER_DATA"] = str(work / "data")
        converter = work / "converter"
        os.environ["BITLADDER_CONVERTER"] = str(converter if converter.exists() else converter_that_knows(converter))
        texts = {"text": str(work / "text.txt"), "workload": str(work / "workload.yaml")}
        work.mkdir(exist_ok=True)
        Path(texts["text"]).write_text((ROOT / "docs/architecture.md").read_text()[:3500])
        Path(texts["workload"]).write_text(WORKLOAD)
        notes = work / "rows.jsonl"
        for name in arguments.names or [name for name in CONFIGS if name not in kept(notes)]:
            cells, messages = row_of(name, work, texts)
            with notes.open("a") as file:
                file.write(json.dumps({"name": name, "cells": cells, "messages": messages}) + "\n")
            print(name, json.dumps(cells), json.dumps(messages), flush=True)
            arguments.out.write_text(page(kept(notes)))


if __name__ == "__main__":
    main()
