"""Options from a file: YAML, with the names that they have on the command line, which goes before it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import typer

from bitladder.cli.terminal import show_error
from bitladder.errors import BadInput
from bitladder.units import KiB

_LARGEST = 64 * KiB


def options_from(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """The callback of ``--config``: what the file says becomes what is meant where the command line says nothing."""
    if path is not None and not context.resilient_parsing:
        try:
            known = {name: one for one in context.command.params for name in _names(one) if one is not parameter}
            context.default_map = dict(_read(path, known))
        except BadInput as error:
            show_error(error, as_json=False)
            raise typer.Exit(error.exit_code) from None
    return path


def _names(parameter: Any) -> set[str]:
    """What a parameter is called in a file: its option without the dashes, or an argument's name."""
    return {name.lstrip("-") for name in parameter.opts if name.startswith("--") or not name.startswith("-")} - {"help"}


def _read(path: Path, known: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names of parameters with their values, all of them texts or lists of texts.

    Raises:
        BadInput: the file cannot be read, is no YAML, or says what no option is called.
    """
    found = []
    for name, value in _document(path).items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise BadInput(
                f"'{path}' sets '{str(name)[:60]}', and no option of this verb is called so.",
                do=f"Did you mean '{near[0]}'?" if near else f"There is: {', '.join(sorted(known))}.",
            )
        several = getattr(known[name], "multiple", False)
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items) or (isinstance(value, list) and not several):
            wanted = "a text or a list of texts" if several else "one text, number, or true or false"
            raise BadInput(f"'{name}' in '{path}' must be {wanted}.")
        found.append((known[name].name, items if several else value))
    return found


def _document(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise BadInput(f"'{path}' has more than {_LARGEST} characters.", do="Give a file of options.")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.BaseLoader)):
            raise BadInput(f"'{path}' uses an alias (*name), which options need not.", do="Write the value out.")
        loaded = yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise BadInput(f"'{path}' cannot be read: {error.strerror or error}.", do="Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"'{path}' is no YAML: {said}.", do="Write lines such as `quality: Q8_0`.") from None
    if not isinstance(loaded, dict | None | str) or (isinstance(loaded, str) and loaded):
        raise BadInput(f"'{path}' must hold options by their names.", do="Write lines such as `quality: Q8_0`.")
    return loaded or {}
