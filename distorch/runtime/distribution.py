# SPDX-License-Identifier: Apache-2.0
"""What a distributed module remembers, and who may change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from distorch import _native
from distorch.display.progress import Progress
from distorch.errors import PlacementError
from distorch.machine.supposed import supposed
from distorch.planner import Inventory, Plan
from distorch.runtime.groups import Group, inventory_of
from distorch.runtime.options import Options, check_module
from distorch.runtime.staging import Origin

_KEY = "_distorch"


def _new_counters() -> Any:
    return _native.new_counters()


class Merger(Protocol):
    """A thread that merges LoRAs into weights while the module is used (`patching.background`)."""

    left: dict[str, int]  # weight -> bytes that are not merged yet
    error: BaseException | None  # what ended it too early

    def is_of(self, module: nn.Module) -> bool:
        """Whether these are the weights of that very module, not of one that it was copied from."""

    def held(self) -> AbstractContextManager[None]:
        """Nothing is merged meanwhile. Afterwards it goes on with what is pending then."""

    def finish(self, progress: Progress = None) -> None:
        """Waits for the last weight. Raises what merging raised."""


@dataclass
class Distribution:
    """What a distributed module remembers: its plan, its counters, its room in the ring."""

    plan: Plan
    options: Options
    origins: dict[str, Origin] = field(default_factory=dict)
    counters: Any = field(default_factory=_new_counters)
    reservation: Any = None
    ring_bytes: int = 0
    patching: Any = None  # LoRAs on it and where its originals are (distorch.patching)
    merging: Merger | None = None  # since the LoRA mode was "background" for the first time
    compiled: bool = False  # see Note [Weights in compiled graphs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Distribution:
        copied = Distribution(self.plan, self.options, dict(self.origins))
        copied.patching = self.patching.copy(memo) if self.patching is not None else None
        copied.reserve(self.ring_bytes)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # A saved module is a plain one: its weights are in the file.
        return _nothing, ()

    def lasting_options(self) -> Options:
        """The options that hold until others are given: it goes on computing where it does.

        On a CPU that nobody asked for, it does so only until a placement names an accelerator. On
        another machine it need not.
        """
        if supposed() is not None:
            return dataclasses.replace(self.options, compute=None)
        given = self.options.compute is not None or self.plan.compute != "cpu"
        return dataclasses.replace(self.options, compute=self.plan.compute if given else None)

    def reserve(self, nbytes: int) -> None:
        """Makes the ring of the compute device at least so large while this object lives."""
        # The old room goes first only when the new one is there.
        self.ring_bytes = nbytes
        self.reservation = _native.reserve(str(torch.device(self.plan.compute)), nbytes)


# Why this thread may not change any module now.
_no_changes: ContextVar[str] = ContextVar("no_changes", default="")


@contextmanager
def no_changes(why: str) -> Iterator[None]:
    """Inside of the block, changes that this thread asks for are a PlacementError."""
    before = _no_changes.set(why)
    try:
        yield
    finally:
        _no_changes.reset(before)


def _nothing() -> None:
    return None


def known_distribution(module: nn.Module) -> Distribution | None:
    """The distribution of a module, if it has one."""
    found = module.__dict__.get(_KEY)
    return found if isinstance(found, Distribution) else None


def distribution_of(module: nn.Module) -> Distribution:
    """The distribution of a module. PlacementError when it has none."""
    check_module(module)
    found = known_distribution(module)
    if found is None and hasattr(module, "_orig_mod"):
        raise PlacementError(
            "this is torch.compile's wrapper of a module: pass what it wraps, model._orig_mod, or "
            "call model.compile(), which needs no wrapper"
        )
    if found is None:
        raise PlacementError(
            f"this {type(module).__name__} is not distributed: call distorch.distribute(model, "
            "spec) first (on the module that you pass here, not on a part of it)"
        )
    return found


def is_distributed(module: nn.Module) -> bool:
    """Whether `distribute` or `load` has placed this module."""
    return known_distribution(module) is not None


def inventory_now(module: nn.Module, groups: list[Group]) -> Inventory:
    """The weights of a module as they are. Those that came from a file may go back to it."""
    known = known_distribution(module)
    return inventory_of(module, groups).in_files(known.origins if known is not None else ())


@contextmanager
def nothing_merging(module: nn.Module) -> Iterator[None]:
    """No thread merges LoRAs into the weights of the module meanwhile, or of a part of it that was
    distributed by itself. The threads go on when the outermost block ends. REQUIRES: a block of
    `changes.alone` around it, as all that changes a module has. PlacementError in a block of
    `no_changes`.
    """
    if why := _no_changes.get():
        raise PlacementError(why)
    with ExitStack() as held:
        for part in module.modules():
            state = known_distribution(part)
            if state is not None and state.merging is not None:
                held.enter_context(state.merging.held())
        yield


def remember(module: nn.Module, state: Distribution, undo: ExitStack) -> None:
    """Gives a module its distribution, in one step."""
    undo.callback(_put_back, module, known_distribution(module))
    module.__dict__[_KEY] = state


def forget(module: nn.Module, undo: ExitStack) -> None:
    """Takes a module's own distribution away, if it has one."""
    undo.callback(_put_back, module, known_distribution(module))
    module.__dict__.pop(_KEY, None)


def _put_back(module: nn.Module, known: Distribution | None) -> None:
    if known is None:
        module.__dict__.pop(_KEY, None)
    else:
        module.__dict__[_KEY] = known
