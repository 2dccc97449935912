"""LoRAs merged while the model is used: `lora_mode="background"`.

Note [Merging in the background]
A weight that is patched when it is fetched is right at once. One after the other, a thread computes
what fetches compute, brings it to where the weight belongs, and lets the weight adopt it: operators
see the one source or the other, whose bits are the same. A weight that was written to or patched
anew meanwhile does not. Which weights are pending is seen on the weights themselves. Who changes a
module as a whole holds the thread meanwhile (`distribution.nothing_merging`).
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from distorch import _donors, _ops
from distorch.formats.safetensors import StoredTensor
from distorch.patching.forms import merged_value
from distorch.patching.reading import ReadAhead
from distorch.patching.state import Original, Patching, base_name
from distorch.planner import Plan
from distorch.runtime import distribution
from distorch.runtime.groups import Group, group_members

Module = TypeVar("Module", bound=nn.Module)

_POLL_SECONDS = 0.1


class Merging:
    """The thread that merges into a module's weights, and what it has left to do."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self.left: dict[str, int] = {}  # weight -> bytes
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begins, or goes on, with what is pending."""
        module = self._module()
        if module is None or not distribution.is_distributed(module):
            return
        state = distribution.distribution_of(module)
        known, plan = state.patching, state.plan
        if known is None or known.merging is not self:
            return
        groups = [g for g in group_members(module) if _is_pending(g, known, plan)]
        self.left = {group.name: group.nbytes for group in groups}
        self.error = None
        self._stopped.clear()
        if groups:
            self._thread = threading.Thread(
                target=self._run, args=(groups, known, plan), name="distorch-merge"
            )
            self._thread.start()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is merged meanwhile."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        try:
            yield
        finally:
            self.start()

    def finish(self, progress: bool | None = None) -> None:
        """Waits for the last weight. Raises what merging raised."""
        show = sys.stderr.isatty() if progress is None else progress
        total = sum(self.left.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=not show) as bar:
            while self._thread is not None and self._thread.is_alive():
                self._thread.join(_POLL_SECONDS)
                bar.update(total - sum(list(self.left.values())) - bar.n)
        if self.error is not None:
            raise self.error

    def _wanted(self) -> bool:
        """Whether to go on: a program that ends, or lets go of the module, does not wait."""
        here = threading.main_thread().is_alive() and self._module() is not None
        return here and not self._stopped.is_set()

    @torch.no_grad()
    def _run(self, groups: list[Group], known: Patching, plan: Plan) -> None:
        try:
            with ReadAhead([_stored(group, known) for group in groups]) as originals:
                while groups and self._wanted():
                    values = originals.next()
                    _merge(groups[0], known, plan, values)
                    del self.left[groups.pop(0).name]
        except BaseException as error:  # told by finish(), and in the report
            self.error = error
            return
        module = self._module()
        if not groups and module is not None and self._wanted():
            distribution.fit_ring(module)


def _is_pending(group: Group, known: Patching, plan: Plan) -> bool:
    original = known.originals.get(base_name(group.name))
    if original is None or not original.merges_later(known.options):
        return False
    if not _ops.is_sharded(group.first) or plan.placement.get(group.name, "disk") == "disk":
        return False
    state = _ops.state(group.first)
    return state.decoded or state.tier == "disk"


def _stored(group: Group, known: Patching) -> StoredTensor | None:
    """The original, where it is read from a file."""
    stored = known.originals[base_name(group.name)].stored
    return stored if _ops.state(group.first).tier == "disk" else None


def _merge(group: Group, known: Patching, plan: Plan, values: torch.Tensor | None) -> None:
    """One weight; `values` its original, or None where the donor has it."""
    weight, name = group.first.detach(), base_name(group.name)
    moves = _ops.moves(weight)
    original, patches = known.originals[name], known.applied.get(name, [])
    compute = torch.device(plan.compute)
    if values is None:
        values = _on_donor(weight, original)
    merged = merged_value(
        patches, values.to(original.dtype), None, original.dtype, compute,
        into=torch.empty(weight.shape, dtype=original.dtype),
    )  # fmt: skip
    same = _donors.shard_on(plan.placement[group.name], merged, compute, group.name)
    if compute.type != "cpu":
        done = torch.Event(compute)
        done.record()
        done.synchronize()
    _ops.adopt(weight, same, moves)


def _on_donor(weight: torch.Tensor, original: Original) -> torch.Tensor:
    """The numbers that a patched weight has on its donor: not to be written to, if in memory."""
    if _ops.state(weight).tier != "cpu":
        return original.values()
    return _ops.donor_bytes(weight).view(original.dtype).view(weight.shape)


def finish_merging(module: Module, *, progress: bool | None = None) -> Module:
    """Waits until all LoRAs of a module with `lora_mode="background"` are merged; returns it.

    Raises what went wrong while merging, such as FetchError; weights that are not merged are still
    patched when they are fetched, with the same bits. PlacementError if it is not distributed.
    """
    known = distribution.distribution_of(module).patching
    if known is None or known.options.mode != "background":
        return module
    if known.merging is None:  # a copy of a module
        known.merging = Merging(module)
        known.merging.start()
    known.merging.finish(progress)
    return module
