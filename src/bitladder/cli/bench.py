"""The verb that compares files of one model, whoever made them: bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import WorkOptions
from bitladder.cli.grouped import grouped
from bitladder.cli.terminal import JsonFlag, print_json, verb
from bitladder.errors import BadInput, UsageError

if TYPE_CHECKING:
    from bitladder.stages.bench_file import Bench

_KIT = (".yaml", ".yml")


@dataclass(kw_only=True)
class BenchOptions(WorkOptions):
    """What ``bench`` is asked."""

    what: Annotated[
        list[str],
        typer.Argument(
            metavar="BENCH.yaml | MODEL RIVAL...",
            help="A file that names a model and its rivals; or the model and files of it: paths, hf:org/name:LEVEL, "
            "each perhaps as NAME=FILE.",
        ),
    ]
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Measure on this text instead of the shipped ones; each one is a domain."),
    ] = None


@verb
@grouped
def bench(options: BenchOptions, json_output: JsonFlag = False) -> None:
    """Rival files of one model beside each other: bytes, hashes, and what each loses on the same texts.

    A rival that cannot be compared is left out and told; the exit code is then 2.
    """
    from bitladder.report.bench import print_bench
    from bitladder.stages.bench import run_bench

    wanted = _bench(options)
    with options.working(quiet=json_output) as work:
        record = run_bench(wanted, work)
    if json_output:
        print_json({**vars(record), "jobs": work.journal.jobs, "warnings": work.journal.warnings})
    else:
        print_bench(record)
    if record.left_out:
        raise typer.Exit(BadInput.exit_code)


def _bench(options: BenchOptions) -> Bench:
    """What is compared; raises UsageError for a model without a rival, BadInput for faults of a file."""
    from bitladder.files.names_apart import names_apart
    from bitladder.stages.bench_file import Bench, read_bench

    first, *others = options.what
    texts = {name: (text,) for name, text in names_apart(options.text or ()).items()}
    if not others and Path(first).suffix.lower() in _KIT:
        read = read_bench(Path(first))
        return Bench(read.model, read.rivals, texts or read.texts)
    if not others:
        raise UsageError("A bench needs a model and at least one rival.", do="bitladder bench MODEL FILE [FILE...]")
    rivals = {}
    for given in others:
        name, equals, place = given.partition("=")
        if not equals or Path(given).exists():
            name, place = Path(given).name.removesuffix(".gguf") if not given.startswith("hf:") else given, given
        if not (name.strip() and place.strip()):
            raise UsageError(f"'{given}' lacks a name or a file.", do="Write NAME=FILE.")
        if name in rivals:
            raise UsageError(f"Two rivals are called '{name}'.", do="Name them: NAME=FILE.")
        rivals[name] = place
    return Bench(first, rivals, texts)


def add_to(app: typer.Typer) -> None:
    """Register this module's verb."""
    app.command()(bench)
