# SPDX-License-Identifier: Apache-2.0
"""Bytes read as a row of choices, so that a fuzzer can build what has a form."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Each call uses up some bytes. When there are none left, every choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        """0 to `below` - 1, at most 256."""
        value = self._data[self._at] if self else 0
        self._at += 1
        return value % below

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.number(len(options))]

    def bytes(self, count: int) -> bytes:
        """So many, filled up with zeros."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken + bytes(count - len(taken))

    def rest(self) -> bytes:
        """All that is left."""
        taken = self._data[self._at :]
        self._at = len(self._data)
        return taken
