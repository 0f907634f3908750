"""The verb that asks two levels the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import ALL_CORES, Threads, working
from bitladder.cli.completion import level_names
from bitladder.cli.options import KeyFiles, KeyNames, endpoint_named
from bitladder.cli.terminal import JsonFlag, print_json, say, verb
from bitladder.errors import UsageError

if TYPE_CHECKING:
    from bitladder.engines.base import Engine
    from bitladder.serve.compare import Comparison
    from bitladder.stages.job import Work
    from bitladder.stages.measured_levels import LatestRun

_SIDE = "A GGUF file, hf:org/name:LEVEL, URL[#MODEL], or with --of a level."


@verb
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE, autocompletion=level_names)],
    b: Annotated[str, typer.Argument(metavar="B", help=_SIDE, autocompletion=level_names)],
    prompt: Annotated[str, typer.Argument(help="What to ask both.")],
    of: Annotated[
        str | None, typer.Option("--of", metavar="MODEL", help="The model that A and B are levels of.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    key_env: KeyNames = None,
    key_file: KeyFiles = None,
    threads: Threads = ALL_CORES,
    json_output: JsonFlag = False,
) -> None:
    """Ask two levels the same and mark where their answers part; of two files, every place where B would.

    Levels of a model are the files that its latest run measured; one that is nowhere is built first.
    """
    from contextlib import closing

    from bitladder.serve.compare import compare as compare_engines
    from bitladder.stages.measured_levels import latest_run

    keys = (key_env, key_file)
    with working(threads, quiet=json_output) as work:
        work.journal.say = say  # what is built is said in any case
        run = latest_run(of, work.progress) if of else None
        if run is not None and not json_output:
            say(run.sentence)
        paths = [_compared(of, what, run, work) for what in (a, b)]
    with closing(_engine(paths[0], threads, keys)) as first, closing(_engine(paths[1], threads, keys)) as second:
        found = compare_engines(first, second, [{"role": "user", "content": prompt}], max_tokens=max_tokens)
    if json_output:
        print_json(found)
    else:
        _show(found)


def _compared(model: str | None, what: str, run: LatestRun | None, work: Work) -> str:
    """A level as the file that was measured; files and addresses as they are."""
    from bitladder.stages.measured_levels import tier_file
    from bitladder.stages.serve import is_level, tier_context

    if what.startswith(("hf:", "ollama:", "lmstudio:")):
        from bitladder.files.sources import resolve

        return str(resolve(what, work.progress).path)
    if not is_level(what):
        return what
    if model is None:
        raise UsageError(
            f"There is no file '{what}'.",
            do="Give GGUF files, hf:org/name:LEVEL, or URLs of OpenAI-compatible endpoints; for levels name their "
            "model with --of MODEL.",
        )
    n_ctx = tier_context(model, what, None, work.progress)
    file = tier_file(model, what, run, n_ctx=n_ctx, work=work)
    if file.note:
        say(file.note)
    return str(file.path)


def _engine(what: str, threads: int, keys: tuple[list[str] | None, list[str] | None]) -> Engine:
    from dataclasses import replace

    from bitladder.engines.address import is_address
    from bitladder.engines.base import Launch
    from bitladder.engines.endpoint import connected
    from bitladder.engines.registry import start
    from bitladder.files.gguf import read_header
    from bitladder.plan.ladder import usable_context
    from bitladder.stages.serve import check_template

    if is_address(what):
        return connected(replace(endpoint_named(what, keys[0], key_files=keys[1]), logprobs=True))
    path = Path(what)
    check_template(path)
    return start(Launch(path, n_ctx=usable_context(read_header(path), None), threads=threads))


def _show(found: Comparison) -> None:
    """Both answers with what only one of them says marked, then where they part."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    from bitladder.visible import console

    out = console(highlight=False)
    panels = []
    for side, own, style in ((found.a, "a", "bold red"), (found.b, "b", "bold green")):
        text = Text()
        for span in found.spans:
            if span.where in ("both", own):
                text.append(span.text, style=style if span.where == own else "")
        rate = f"{side.decode_tokens_per_s:.1f} tok/s" if math.isfinite(side.decode_tokens_per_s) else "rate not known"
        facts = Text(f"{rate}, first token after {side.first_token_s:.2f} s\n", style="dim")
        # No title of the panel: it would be cut off where the name of a file is long.
        panels.append(Panel(Group(Text(side.level, style="bold"), facts, text), width=max(40, out.width // 2 - 1)))
    out.print(Columns(panels))
    if found.same:
        out.print("The same answer.")
    elif found.parting:
        at = found.parting
        kind = "a near tie, which rounding alone can turn" if at.is_tie else "a clear difference"
        out.print(
            f"The answers first differ at token {at.index + 1}, {kind}: {found.a.level} chose {at.token_a!r} "
            f"({_p(at.a_of_a)}; {at.token_b!r} {_p(at.a_of_b)}); {found.b.level} chose {at.token_b!r} "
            f"({_p(at.b_of_b)}; {at.token_a!r} {_p(at.b_of_a)})."
        )
        if found.later is not None:
            ties = sum(at.is_tie for at in found.later)
            out.print(
                f"Given {found.a.level}'s own words up to there, {found.b.level} would choose another token at "
                f"{len(found.later)} further places, {ties} of them near ties."
            )
        for at in found.later or ():
            chose = f"{at.token_a!r} ({_p(at.a_of_a)}) -> {at.token_b!r} ({_p(at.b_of_b)})"
            out.print(f"  token {at.index + 1}: {chose}{', a near tie' if at.is_tie else ''}")


def _p(chance: float) -> str:
    return f"probability {chance:.2f}" if math.isfinite(chance) else "was not among its likeliest"


def add_to(app: typer.Typer) -> None:
    """Register this module's verb."""
    app.command()(compare)
