# SPDX-License-Identifier: Apache-2.0
"""The bar on a node: where its model's weights are, and what travels while it samples.

Note [The bar on a node]
The web page gets a small picture for the node that placed a model. It gets one when the model was
loaded or had to move, and two each second while it samples. Nothing is sent, and no thread is
started, when no page waits for the prompt. Whatever goes wrong with a picture is only logged.

The thread that watches never waits for the device. It asks for the bytes that were sent for, and
for the stalls whose end is known by then.

The host keeps models for later prompts, in which the node may have another number, and the page may
show another workflow by then. So the node is remembered with its kind and with what was typed into
it (`Node`). The page looks whether the node of that number is such a one, else for the only one
that is.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

import distorch
from distorch.comfy import host
from distorch.display.placements import device_bar
from distorch.display.tables import human_bytes

EVENT = "distorch.bar"
PERIOD = 0.5  # seconds from one picture to the next
_log = logging.getLogger("distorch")


@dataclass(frozen=True)
class Node:
    """A node of a workflow: its number, its kind, and what was typed into it."""

    number: str | None
    kind: str
    typed: Mapping[str, Any]


_running: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)


@contextlib.contextmanager
def running(kind: str, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Until the end of the block a node of ours runs, of this kind and with these inputs."""
    typed = {name: value for name, value in inputs.items() if isinstance(value, str | int | float)}
    token = _running.set(Node(host.node_now(), kind, typed))
    try:
        yield
    finally:
        _running.reset(token)


def running_node() -> Node | None:
    """The node of ours that runs."""
    return _running.get()


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


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """A picture is not worth an error in the sampling that it shows."""
    try:
        yield
    except Exception:
        _log.debug("the bar on the node failed", exc_info=True)


def show(node: Node | None, bar: Callable[[], Bar]) -> None:
    """Sends a bar to its node on the web page. It is not made when no page waits."""
    with _harmless():
        if node is not None and host.page_waits():
            host.tell_page(EVENT, {**asdict(node), "svg": bar().svg()})


def rates(travelled: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Link -> GB/s (10^9)."""
    return {link: n / seconds / 1e9 for link, n in travelled.items()} if seconds > 0 else {}


def sentence(travelled: Mapping[str, int], stall: float, seconds: float) -> str:
    """How fast weights came, and which part of the time the device waited for them. How many bytes
    and seconds that were, if the time is not known (0).
    """
    if seconds > 0:
        said = [f"{link} {_rate(n)}" for link, n in rates(travelled, seconds).items() if n > 0]
        waited = f"{min(100.0, 100 * stall / seconds):.0f}%"
    else:
        said = [f"{link} {human_bytes(n)}" for link, n in travelled.items() if n > 0]
        waited = f"{stall:.2f} s"
    return "   ".join([*(said or ["nothing travels"]), f"stalls {waited}"])


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
        self._before: distorch.Stats | None = None
        with _harmless():
            self._before = distorch.stats(model, wait=False)

    def tell(self, say: Callable[[str], None]) -> None:
        """Says it in a sentence. Nothing if somebody has begun to count anew."""
        before = self._before
        if before is None:
            return
        with _harmless():
            now = distorch.stats(self._model, wait=False)
            travelled = {link: n - before.bytes.get(link, 0) for link, n in now.bytes.items()}
            stall = now.stall_seconds - before.stall_seconds
            if stall >= 0 and all(n >= 0 for n in travelled.values()):
                say(sentence(travelled, stall, time.monotonic() - self._begin))
