# SPDX-License-Identifier: Apache-2.0
"""The errors of distorch: each names what was expected, what was found and what to do."""

import inspect
import warnings

_LONGEST = 16_000  # characters of a message


def printable(text: str) -> str:
    """Replaces control characters, line breaks and marks of direction.

    Names come from files of strangers. In a terminal such characters could hide or forge lines, and
    in a picture they would break the layout or the XML.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _one_line(text: str) -> str:
    line = printable(text.replace("\n", " "))
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


class DistorchError(Exception):
    """Base of every error that distorch raises on purpose.

    A message is one line of bounded length. It quotes names from files: what such a name could do
    to a terminal is taken out.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(_one_line(a) if isinstance(a, str) else a for a in arguments))


class SpecError(DistorchError, ValueError):
    """The placement string (names the entry and its position) or another option is wrong."""


class PlacementError(DistorchError, RuntimeError):
    """A placement cannot be honoured with this model on these devices."""


class PlacementWarning(UserWarning):
    """A placement is followed as far as it can be: a device holds more than its share."""


class FormatError(DistorchError, ValueError):
    """A file is not there, damaged, cut short, or of an unknown kind."""


class FetchError(DistorchError, RuntimeError):
    """Bytes could not be brought from a donor, or could not be written back."""


def warn_at_caller(text: str, category: type[Warning] = PlacementWarning) -> None:
    """A warning at the line outside of distorch that called it."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("distorch."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
