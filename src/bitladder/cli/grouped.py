"""Options as one object: a verb's options are the fields of a dataclass, which other verbs can share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

LAST = ("threads", "device", "force")


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the fields of the dataclass that its first parameter is annotated with as options of its own; it is
    called with them as one object. What must be given comes first, how
    work is done (``LAST``) last."""
    first, *own = inspect.signature(function, eval_str=True).parameters.values()
    kind = first.annotation
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = sorted(dataclasses.fields(kind), key=lambda f: (f.default is not dataclasses.MISSING, f.name in LAST))
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields
    ]

    @functools.wraps(function)
    def wrapped(**given: Any) -> None:
        options = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        function(options, **given)

    parameters = [*shared, *own]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__
    return wrapped
