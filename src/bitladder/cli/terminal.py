"""What every verb shares: the error card, the exit code, progress on stderr, and ``--json`` on stdout."""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup
from typer.models import OptionInfo

from bitladder.cli.completion import model_names
from bitladder.cli.ending import INTERRUPTED, say_stopped
from bitladder.errors import BitladderError, UsageError
from bitladder.progress import Progress, StepsOnly, silent
from bitladder.records import to_json
from bitladder.visible import console, on_one_line, takes_all, visible, visible_json

if TYPE_CHECKING:
    from rich.progress import TaskID

P = ParamSpec("P")
R = TypeVar("R")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of a table.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, a checkpoint folder, hf:org/name[@revision][:LEVEL], or smollm2-135m.",
        autocompletion=model_names,
    ),
]


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors into one clear message and an exit code; Ctrl-C into a word about what is kept."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _check_numbers(function, kwargs)
            return function(*args, **kwargs)
        except BitladderError as error:
            show_error(error, as_json=bool(kwargs.get("json_output")))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say_stopped()
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None  # the reader of our output went away: nothing is wrong with us

    return wrapped


def _check_numbers(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse what an option's bounds let through, because it compares with nothing, and infinities."""
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{_option(function, name)} is {value}, which is no number.", do="Give a number.")


def _option(function: Callable[..., Any], name: str) -> str:
    """What a parameter of a verb is called on the command line."""
    annotation = inspect.signature(function, eval_str=True).parameters[name].annotation
    told = [info for info in getattr(annotation, "__metadata__", ()) if isinstance(info, OptionInfo)]
    # typer keeps the first of an annotation's names where a default would stand
    declared = [one for info in told for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    return next((one for one in declared if one.startswith("--")), f"--{name.replace('_', '-')}")


def show_error(error: BitladderError, *, as_json: bool) -> None:
    """The three parts of an error on stderr; with ``--json`` also as a document on stdout."""
    from rich.text import Text

    out = console(stderr=True, highlight=False, soft_wrap=True)
    # A name with a line break must not begin a line that looks like another message.
    out.print(Text("error: ", style="bold red") + Text(error.found.replace("\n", "\n       ")))
    for part in (error.means, error.do):
        if part:
            out.print(Text("       " + part.replace("\n", "\n       ")))
    if as_json:
        print_error_json(type(error).__name__, error.found, error.means, error.do)


def print_error_json(kind: str, found: str, means: str = "", do: str = "") -> None:
    """An error on stdout, as the one document that a program gets instead of a record."""
    document = {"error": {"kind": kind, "found": found, "means": means, "do": do}}
    print(_json(document))


_NOT_UNDERSTOOD: type[Exception] = typer.BadParameter.__mro__[1]
"""Click's UsageError, of whichever click this typer carries: some bring their own."""


class Verbs(TyperGroup):
    """Help that says of every verb the whole sentence, where the inherited one breaks off; and with ``--json`` what
    no verb understands told as JSON, too."""

    def invoke(self, ctx: Any) -> Any:
        """Click's own, and the document on stdout."""
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except _NOT_UNDERSTOOD as error:
            said: Any = error  # the class has no name that mypy could find
            if as_json and ctx.parent is None:
                print_error_json("UsageError", said.format_message())
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 as click calls it
        """The list of verbs, each with its whole sentence."""
        sentences = [(name, verb.get_short_help_str(limit=1000)) for name, verb in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sentences)


def print_json(record: Any) -> None:
    """A record on stdout, as the JSON that other programs read."""
    print(_json(to_json(record), indent=2))


def put_json(document: str) -> None:
    """A line of JSON on stdout, as it is but for what would steer a terminal."""
    print(visible_json(document) if takes_all(sys.stdout) else _json(json.loads(document)))


def _json(plain: Any, indent: int | None = None) -> str:
    """JSON that stdout takes: where its encoding lacks characters, with JSON's own escapes."""
    return visible_json(json.dumps(plain, indent=indent, ensure_ascii=not takes_all(sys.stdout)))


def say(text: str) -> None:
    """A line for the person, on stderr, so that stdout stays the result."""
    print(visible(text), file=sys.stderr, flush=True)


def put(text: str = "", end: str = "\n") -> None:
    """A line of the result, on stdout."""
    print(visible(text), end=end)


@contextmanager
def progress_display(*, quiet: bool = False) -> Iterator[Progress]:
    """A live bar on a terminal, a line every few seconds in a log, nothing when ``quiet``."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _live_bar() as progress:
            yield progress
    else:
        yield log_lines()


@contextmanager
def _live_bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console(stderr=True), transient=False) as bars:
        steps = Steps()
        task: TaskID | None = None

        def progress(what: str, done: float, total: float) -> None:
            nonlocal task
            if steps.is_new(done, total) or task is None:
                task = bars.add_task(on_one_line(what), total=total)
            bars.update(task, description=on_one_line(what), completed=done, total=total)

        yield StepsOnly(progress)


class Steps:
    """Tells the next piece of work from the next step of one: there the total stays and the count does not fall."""

    def __init__(self) -> None:
        self._done, self._total = 0.0, -1.0

    def is_new(self, done: float, total: float) -> bool:
        """Whether this is said by another piece of work than the last."""
        new = total != self._total or done < self._done or (self._done >= self._total and done < total)
        self._done, self._total = done, total
        return new


SECONDS_BETWEEN_LINES = 5.0


def log_lines() -> Progress:
    """Where the work is as a line on stderr: when a piece of work begins, and every few seconds."""
    steps = Steps()
    last = 0.0

    def progress(what: str, done: float, total: float) -> None:
        nonlocal last
        new = steps.is_new(done, total)
        now = time.monotonic()
        if new or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            say(f"{on_one_line(what)}: {100 * done / total if total else 100:.0f}%")

    return StepsOnly(progress)
