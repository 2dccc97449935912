# SPDX-License-Identifier: Apache-2.0
"""What nodes are given, checked against what they have declared to the host.

Note [Linked inputs]
The host checks what people choose and type. What another node gives it takes as it is: a float that
is no number, a list, a file that the loader does not offer. So our nodes look at every input once
more. They convert values as the host converts typed ones, and refuse what cannot be converted or
chosen. Limits of numbers are not checked: some workflows go beyond them on purpose.
"""

from __future__ import annotations

import functools
import inspect
import math
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distorch.comfy import live
from distorch.display.tables import shortened
from distorch.errors import SpecError

_MOST_CHOICES, _MOST_LETTERS = 20, 80


def checking(node: type[Any]) -> type[Any]:
    """The same class. What the host calls now checks its inputs first: SpecError."""
    name = node.FUNCTION
    if hasattr(vars(node).get(name), "__wrapped__"):  # a class under two names
        return node
    run = getattr(node, name)
    names = list(inspect.signature(run).parameters)[1:]

    @functools.wraps(run)
    def checked_run(self: Any, *first: Any, **given: Any) -> Any:
        inputs = {**dict(zip(names, first, strict=False)), **given}
        with live.running(type(self).__name__, inputs):
            return run(self, **checked(type(self), inputs))

    setattr(node, name, checked_run)
    return node


def checked(node: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, converted; without optional ones that are None. SpecError names a wrong one."""
    found = dict(given)
    declared = node.INPUT_TYPES()
    for part in ("required", "optional"):
        for name, kind in declared.get(part, {}).items():
            if name not in given:
                continue
            if given[name] is None and part == "optional":
                del found[name]
                continue
            try:
                found[name] = _converted(kind, given[name])
            except _WantedError as wanted:
                shown = _shown(given[name])
                raise SpecError(
                    f"the node's input {name!r}: expected {wanted}, found {shown}"
                ) from None
    validate = getattr(node, "VALIDATE_INPUTS", None)
    if validate is not None:
        known = inspect.signature(validate).parameters
        problem = validate(**{name: value for name, value in found.items() if name in known})
        if problem is not True:
            raise SpecError(str(problem))
    return found


class _WantedError(Exception):
    """What an input takes, in words."""


def _converted(kind: tuple[Any, ...], value: Any) -> Any:
    choices = kind[0]
    options = kind[1] if len(kind) > 1 and isinstance(kind[1], Mapping) else {}
    if choices == "COMBO":  # without any, the host asks for them elsewhere
        choices = options.get("options")
    if isinstance(choices, list | tuple):
        return value if options.get("multiselect") else _chosen(value, choices)
    convert = _CONVERSIONS.get(choices)
    return value if convert is None else convert(value)


def _number(value: Any) -> float:
    """Of a number of any kind, of numpy or PyTorch, too, or of its text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise _WantedError("a number")
    return number


def _text(value: Any) -> str:
    try:
        if isinstance(value, str | int | float):
            return str(value)
    except ValueError:  # an int of too many digits
        pass
    raise _WantedError("text")


def _truth(value: Any) -> bool:
    if not isinstance(value, str | int | float):
        raise _WantedError("true or false")
    return bool(value)


_CONVERSIONS = {
    "FLOAT": _number, "INT": lambda value: int(_number(value)), "STRING": _text, "BOOLEAN": _truth,
}  # fmt: skip


def _chosen(value: Any, choices: Sequence[Any]) -> Any:
    """What is meant: one choice, maybe spelled in another way; the first device of a kind ("cuda");
    or several choices with commas between them.
    """
    if isinstance(value, str | int | float) and value in choices:
        return value
    text = str(value).strip() if isinstance(value, str | torch.device) else ""
    for choice in map(str, choices) if text else ():
        if choice.startswith(f"{text}:") or _plain(choice) == _plain(text):
            return choice
    parts = [part.strip() for part in text.split(",")]
    if all(part in choices for part in parts):
        return ",".join(parts)
    if not choices:
        raise _WantedError("one of its list, which is empty here")
    more = ", ..." if len(choices) > _MOST_CHOICES else ""
    raise _WantedError("one of " + ", ".join(map(str, choices[:_MOST_CHOICES])) + more)


def _plain(name: str) -> str:
    """One spelling for names that lead to the same file, such as "./flux/a" and "flux\\a"."""
    return posixpath.normpath(name.replace("\\", "/"))


def _shown(value: Any) -> str:
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    try:
        return shortened(repr(value), _MOST_LETTERS)
    except ValueError:  # an int of too many digits
        return "a number of thousands of digits"
