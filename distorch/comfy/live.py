# SPDX-License-Identifier: Apache-2.0
"""The bar on a node: where its model's weights are, and what travels while it samples.

Note [The bar on a node]
The node that placed a model is remembered on the model's patcher. The web page gets a small picture
for that node when the model was loaded or had to move, and twice a second while it samples. Nothing
is sent, and no thread is started, when no page waits for the prompt.

The thread that watches never waits for the device. It asks for the bytes that were sent for, and
for the stalls whose end is known by then.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

import distorch
from distorch.comfy import host
from distorch.display.placements import device_bar
from distorch.errors import PlacementError

EVENT = "distorch.bar"
PERIOD = 0.5  # seconds from one picture to the next


@dataclass(frozen=True)
class Bar:
    """What one picture shows: bytes by device, the device that computes, and a sentence. `ok` is
    False if the sentence is about something that is wrong.
    """

    held: Mapping[str, int]
    compute: str
    note: str
    ok: bool = True

    def svg(self) -> str:
        """The picture."""
        return device_bar(self.held, {self.compute}, self.note, ok=self.ok).svg()


def show(node: str | None, bar: Bar) -> None:
    """Sends a bar to its node on the web page."""
    if node is not None and host.page_waits():
        host.tell_page(EVENT, {"node": node, "svg": bar.svg()})


def rates(travelled: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Link -> GB/s (10^9)."""
    return {link: n / seconds / 1e9 for link, n in travelled.items()} if seconds > 0 else {}


def sentence(travelled: Mapping[str, int], stall: float, seconds: float) -> str:
    """How fast weights came, and which part of the time the device waited for them."""
    said = [f"{link} {_rate(n)}" for link, n in rates(travelled, seconds).items() if n > 0]
    waited = min(100.0, 100 * stall / seconds) if seconds > 0 else 0.0
    return "   ".join([*(said or ["nothing travels"]), f"stalls {waited:.0f}%"])


def _rate(gb: float) -> str:
    return f"{gb:.2f} GB/s" if gb >= 0.1 else f"{1000 * gb:.1f} MB/s"


@contextlib.contextmanager
def watched(model: nn.Module, say: Callable[[str], None]) -> Iterator[None]:
    """Calls `say` with a sentence twice a second until the end of the block, from another thread.
    At the end once more, with a sentence about the whole block.
    """
    ended = threading.Event()
    whole = _Since(model)
    watcher = threading.Thread(
        target=_watch, args=(model, say, ended), name="distorch-bar", daemon=True
    )
    with contextlib.suppress(RuntimeError):  # no thread is left: there is one picture, at the end
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if watcher.ident is not None:
            watcher.join()
        whole.tell(say)


def _watch(model: nn.Module, say: Callable[[str], None], ended: threading.Event) -> None:
    since = _Since(model)
    while not ended.wait(PERIOD):
        since.tell(say)
        since = _Since(model)


class _Since:
    """What has travelled since this was made. It never waits for the device."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._begin = model, time.monotonic()
        self._before = self._now()

    def _now(self) -> distorch.Stats | None:
        try:
            return distorch.stats(self._model, wait=False)
        except PlacementError:  # somebody has undistributed it
            return None

    def tell(self, say: Callable[[str], None]) -> None:
        """Says it in a sentence. Nothing if somebody has begun to count anew."""
        before, now = self._before, self._now()
        if before is None or now is None:
            return
        travelled = {link: n - before.bytes.get(link, 0) for link, n in now.bytes.items()}
        stall = now.stall_seconds - before.stall_seconds
        if stall >= 0 and all(n >= 0 for n in travelled.values()):
            say(sentence(travelled, stall, time.monotonic() - self._begin))
