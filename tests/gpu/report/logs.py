# SPDX-License-Identifier: Apache-2.0
"""The log of a process that may write without end."""

from __future__ import annotations

CAP = 256 << 10  # bytes


class CappedLog:
    """The first and the last bytes of a stream, and how many were left out between."""

    def __init__(self, cap: int = CAP) -> None:
        self._half = cap // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    def add(self, data: bytes) -> None:
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._half:
            self._trim()

    def _trim(self) -> None:
        too_many = len(self._tail) - self._half
        if too_many > 0:
            del self._tail[:too_many]
            self._dropped += too_many

    def text(self) -> str:
        self._trim()
        between = f"\n… {self._dropped} bytes left out …\n".encode() if self._dropped else b""
        return bytes(self._head + between + self._tail).decode(errors="replace")


def middle_out(text: str, most: int) -> str:
    """At most about `most` bytes of a text: its head and its tail."""
    log = CappedLog(most)
    log.add(text.encode(errors="replace"))
    return log.text()
