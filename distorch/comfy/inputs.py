# SPDX-License-Identifier: Apache-2.0
"""What nodes are given, checked as the host checks what is typed into them.

Note [Linked inputs]
The host checks the values that people choose and type. What another node gives it takes as it is: a
float that is no number, a list, a file that the loader's own list does not have. Our nodes check
every input once more against what they have declared to the host, whatever it comes from.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distorch.display.tables import shortened
from distorch.errors import SpecError

_MOST_CHOICES, _MOST_LETTERS = 20, 80


def checking(node: type[Any]) -> type[Any]:
    """The same class. What the host calls now checks its inputs first: SpecError."""
    name = node.FUNCTION
    run = getattr(node, name)
    if hasattr(run, "__wrapped__"):  # a class under two names
        return node

    @functools.wraps(run)
    def checked_run(self: Any, **given: Any) -> Any:
        check(node, given)
        return run(self, **given)

    setattr(node, name, checked_run)
    return node


def check(node: type[Any], given: Mapping[str, Any]) -> None:
    """Raises SpecError for an input that the host would not have let through."""
    for inputs in node.INPUT_TYPES().values():
        for name, kind in inputs.items():
            wanted = _wanted(kind, given[name]) if name in given else None
            if wanted is not None:
                found = _shown(given[name])
                raise SpecError(f"the node's input {name!r}: expected {wanted}, found {found}")
    validate = getattr(node, "VALIDATE_INPUTS", None)
    if validate is None:
        return
    known = inspect.signature(validate).parameters
    found = validate(**{name: value for name, value in given.items() if name in known})
    if found is not True:
        raise SpecError(str(found))


def _wanted(kind: tuple[Any, ...], value: Any) -> str | None:
    """What an input takes, in words; None if it takes this value."""
    choices = kind[0]
    options = kind[1] if len(kind) > 1 and isinstance(kind[1], Mapping) else {}
    if choices == "COMBO":  # without any, the host asks for them elsewhere
        choices = options.get("options")
    if isinstance(choices, list | tuple):
        free = value is None or options.get("multiselect")
        return None if free or _is_one_of(value, choices) else _listed(choices)
    if choices in ("FLOAT", "INT"):
        return None if _is_finite(value) else "a number"
    return "text" if choices == "STRING" and not isinstance(value, str) else None


def _is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    return isinstance(value, str | int | float) and value in choices


def _listed(choices: Sequence[Any]) -> str:
    if not choices:
        return "one of its list, which is empty here"
    more = ", ..." if len(choices) > _MOST_CHOICES else ""
    return "one of " + ", ".join(map(str, choices[:_MOST_CHOICES])) + more


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def _shown(value: Any) -> str:
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    try:
        return shortened(repr(value), _MOST_LETTERS)
    except ValueError:  # an int of too many digits
        return "a number of thousands of digits"
