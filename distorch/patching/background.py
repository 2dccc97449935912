# SPDX-License-Identifier: Apache-2.0
"""LoRAs merged while the model is used: `lora_mode="background"`.

Note [Merging in the background]
A weight that is patched when it is fetched is right at once. One after the other, a thread fetches
each (a step that runs meanwhile shares these fetches), brings a copy to where the weight belongs,
and lets the weight adopt it: operators see the one source or the other, whose bits are the same. A
weight that was written to or patched anew meanwhile does not. Which weights are pending is seen on
the weights themselves. Who changes a module as a whole holds the thread meanwhile
(`distribution.nothing_merging`).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from distorch import _donors, _ops
from distorch.display.progress import Progress, progress_of
from distorch.formats.plain_names import base_name
from distorch.patching.state import Patching
from distorch.planner import Plan
from distorch.runtime import distribution, placing
from distorch.runtime.changes import alone
from distorch.runtime.groups import Group, group_members

Module = TypeVar("Module", bound=nn.Module)

_MOMENT, _POLL = 2e-4, 5e-3  # seconds


@dataclass(eq=False)
class _Work:
    """What one thread does, and how far it is.

    Plain attributes. Ctrl-C in the middle of an Event's methods leaves it locked for ever, and in
    the middle of Thread.join() it makes a thread that runs count as one that has ended.
    """

    groups: list[Group]
    plan: Plan
    process: int = field(default_factory=os.getpid)
    stop: bool = False  # it is to end
    begun: bool = False
    ended: bool = False
    abandoned: bool = False  # Ctrl-C came while it was started. It may begin, and then only ends

    def is_running(self) -> bool:
        """Whether its thread is there, or will be in a moment."""
        there = self.begun or not self.abandoned
        return there and not self.ended and self.process == os.getpid()


class Merging:
    """The thread that merges into a module's weights, and what it has left to do."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._work: _Work | None = None  # the latest
        self._holders = 0  # blocks of `held` that have not ended, of the one thread in `alone`
        self.left: dict[str, int] = {}  # weight -> bytes
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begins, or goes on, with what is pending."""
        module = self._module()
        if module is None or not distribution.is_distributed(module):
            return
        state = distribution.distribution_of(module)
        known, plan = state.patching, state.plan
        if known is None or state.merging is not self:
            return
        self._end()
        groups = [g for g in group_members(module) if _is_pending(g, known, plan)]
        self.left = {group.name: group.nbytes for group in groups}
        self.error = None
        if not groups:
            return
        work = _Work(groups, plan)
        thread = threading.Thread(target=self._run, args=(work,), name="distorch-merge")
        try:
            self._work = work
            thread.start()
        except BaseException:
            work.stop = work.abandoned = True
            raise

    def _end(self) -> None:
        """Waits until no thread merges any more."""
        if self._work is not None:
            self._work.stop = True
            while self._work.is_running():
                time.sleep(_MOMENT)

    def is_of(self, module: nn.Module) -> bool:
        """Whether these are the weights of that very module, not of one that it was copied from."""
        return self._module() is module

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is merged meanwhile. The outermost block goes on with what is pending then."""
        self._end()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self.start()

    def finish(self, progress: Progress = None) -> None:
        """Waits for the last weight. Raises what merging raised."""
        module = self._module()
        if module is None:
            return
        with alone(module, nested=True):
            if self.error is None and not self._is_running():
                self.start()  # an interrupt may have ended it
        left = total = sum(self.left.values())
        with progress_of(progress, total, "merging") as done:
            running = True
            while running:
                time.sleep(_POLL)
                before, left = left, sum(list(self.left.values()))
                done(max(0, before - left))  # another thread may have put on more LoRAs
                with alone(module, nested=True):  # changes stop it and start it again
                    running = self._is_running()
        if self.error is not None:
            raise self.error

    def _is_running(self) -> bool:
        return self._work is not None and self._work.is_running()

    def _wanted(self, work: _Work) -> bool:
        """Whether to go on: a program that ends, or lets go of the module, does not wait."""
        here = threading.main_thread().is_alive() and self._module() is not None
        return here and not work.stop

    @torch.no_grad()
    def _run(self, work: _Work) -> None:
        work.begun = True
        groups = work.groups
        try:
            while groups and self._wanted(work):
                _merge(groups[0], work.plan)
                del self.left[groups.pop(0).name]
            module = self._module()
            if not groups and module is not None and self._wanted(work):
                placing.fit_ring(module)
        except BaseException as error:  # told by finish(), and in the report
            self.error = error
        finally:
            work.ended = True


def _is_pending(group: Group, known: Patching, plan: Plan) -> bool:
    original = known.originals.get(base_name(group.name))
    if original is None or not original.merges_later(known.options):
        return False
    if not _ops.is_sharded(group.first) or plan.placement.get(group.name, "disk") == "disk":
        return False
    state = _ops.state(group.first)
    return state.decoded or state.tier == "disk"


def _merge(group: Group, plan: Plan) -> None:
    """One weight, unless it is written to or patched anew meanwhile."""
    weight, compute = group.first.detach(), torch.device(plan.compute)
    moves = _ops.moves(weight)
    merged = weight.clone(memory_format=torch.contiguous_format)
    same = _donors.shard_on(plan.placement[group.name], merged, compute, group.name)
    if compute.type != "cpu":
        done = torch.Event(compute)
        done.record()
        done.synchronize()
    _ops.adopt(weight, same, moves)


def merge_in_background(module: nn.Module) -> None:
    """Begins to merge what is pending on a distributed module, unless that has begun."""
    with alone(module, nested=True):
        state = distribution.distribution_of(module)
        if state.merging is None or not state.merging.is_of(module):  # a copy of a module
            merging = Merging(module)
            state.merging = merging
            merging.start()


def finish_merging(module: Module, *, progress: Progress = None) -> Module:
    """Waits until all LoRAs of a module with `lora_mode="background"` are merged.

    Merging fetches each weight once. `stats` counts these fetches, too.

    Args:
        module: A distributed module.
        progress: As in `distribute`.

    Returns:
        The module itself.

    Raises:
        FetchError: Merging ended with an error. Weights that are not merged are still patched when
            they are fetched, with the same bits.
        PlacementError: The module is not distributed.
    """
    state = distribution.distribution_of(module)
    if state.patching is None or state.patching.options.mode != "background":
        return module
    merge_in_background(module)
    if state.merging is not None:
        state.merging.finish(progress)
    return module
