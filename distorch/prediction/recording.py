# SPDX-License-Identifier: Apache-2.0
"""Records which weights each operator of a step uses, and how long it takes.

A dispatch mode sees every operator that reaches a device, with its arguments. A weight is known by
its bytes in a storage, so views of it count as uses of it.

Time on a device is taken by an event before each operator and one behind it. What the device waited
for weights in between is in the trace, and is taken off. A device that is idle also waits for the
host: such a use is marked, and `predict` takes off what the host needs to issue an operator.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from distorch.errors import PlacementError
from distorch.machine import machine
from distorch.prediction.operators import (
    Names,
    append,
    is_no_work,
    needs_values,
    tensors_in,
    use_of,
)
from distorch.runtime.distribution import distribution_of
from distorch.runtime.groups import form_of, group_members
from distorch.step import Step, Use
from distorch.timeline import Span, Timeline
from distorch.tracing import trace

_MASKS = (torch.bool, torch.uint8)


@contextmanager
def record_step(module: nn.Module) -> Iterator[Step]:
    """Records the step that runs inside of the `with` block.

    Example::

        model(x)  # once before, so that nothing is compiled or chosen while it is recorded
        with distorch.record_step(model) as step:
            model(x)
        print(distorch.predict(model, step, "cuda:0,4gb;cpu,*"))

    Run one step in the block. Everything that this thread computes there counts, also a backward
    pass. A step of another batch or resolution is another step. The block fills the step when it
    ends without an error. Compiled modules run as plain code in it.

    Args:
        module: A distributed module, placed in any way.

    Returns:
        A context manager that gives a `Step`.

    Raises:
        PlacementError: The module is not distributed, a trace or another recording is running, or
            the module was placed anew inside of the block.
    """
    placed = distribution_of(module)
    compute, plan = placed.plan.compute, placed.plan
    step = Step(compute)
    recorder = _Recorder(Names(module), torch.device(compute))
    if compute != "cpu":
        machine.synchronize(compute)  # what was fetched ahead is decoded, and disturbs no operator
    with trace(module) as timeline, recorder:
        yield step
    if distribution_of(module).plan is not plan:
        raise PlacementError(
            "the module was placed anew while its step was recorded; record a step alone"
        )
    step.uses += recorder.uses(timeline)
    used = set(step.weights)
    for group in group_members(module):
        if group.name in used:
            step.forms[group.name] = form_of(group.first)
    if compute == "cpu":
        for span in timeline.spans:
            if span.track == "decodes" and span.bytes:
                step.decodes[span.name] = (span.end - span.start) / span.bytes


class _Noted(NamedTuple):
    """A use, with two marks in place of its seconds: their places in the list of all marks."""

    before: int
    behind: int
    use: Use


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator."""

    supports_higher_order_operators = True  # torch.cond, flex_attention: each counts as one

    def __init__(self, names: Names, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._device = device
        self._on_host = device.type == "cpu"
        self._now: Callable[[], Any] = time.perf_counter if self._on_host else _events_of(device)
        self._marks: list[Any] = []
        self._noted: list[_Noted] = []

    def __enter__(self) -> _Recorder:
        self._mark()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def _mark(self) -> int:
        self._marks.append(self._now())
        return len(self._marks) - 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_no_work(func):
            return func(*args, **kwargs)
        use = use_of(self._names, func, args, kwargs)
        idle = float(not self._on_host and self._marks[-1].query())
        before = self._mark()
        result = func(*args, **kwargs)
        if not (self._on_host or idle) and self._marks[before].query():
            idle = 0.5  # it ran dry while the operator was issued: for half of that time, say
        behind = self._mark()
        copied, waits = 0, False
        if isinstance(func, OpOverload):
            copied, waits = self._of_the_host(func, args, kwargs)
        use = use._replace(copied=copied, idle=idle, host_waits=waits)
        self._noted.append(_Noted(before, behind, use))
        return result

    def _of_the_host(self, func: OpOverload, args: Any, kwargs: Any) -> tuple[int, bool]:
        """Bytes that the operator copies from RAM, and whether the host waits for it."""
        if self._on_host:
            return 0, False
        if (copy := _copy_by(func, args, kwargs)) is not None:
            source, target, non_blocking = copy
            if source.device.type == "cpu" and _same_device(target, self._device):
                return source.nbytes, not (non_blocking and source.is_pinned())
            leaves = source.device == self._device and not _same_device(target, self._device)
            return 0, leaves and not non_blocking
        there = [t for t in tensors_in((*args, *kwargs.values())) if t.device == self._device]
        if not there or not needs_values(func):
            return 0, False
        # An index of numbers is an ordinary operator. One of booleans has to be counted.
        masks = any(tensor.dtype in _MASKS for tensor in there)
        return 0, func._schema.name != "aten::index" or masks

    def uses(self, timeline: Timeline) -> list[Use]:
        """What was noted, in seconds, without the waits that the trace has.

        The trace began just before the first mark. So a wait is taken off the use in whose time it
        lies, to within microseconds. A device that decodes meanwhile does half of each.
        """

        def times(*kinds: str) -> _Times:
            return _Times(span for span in timeline.spans if span.track.startswith(kinds))

        at = self._seconds_of_marks()
        waits = times("stalls", "decodes") if self._on_host else times("stalls ")
        decodes = times() if self._on_host else times("stalls ", "decodes ")
        found: list[Use] = []
        for before, behind, use in self._noted:
            begin, end = at[before], at[behind]
            waited = waits.between(begin, end)
            shared = max(0.0, decodes.between(begin, end) - waited)
            append(found, use._replace(seconds=max(end - begin - waited - shared / 2, 0.0)))
        return found

    def _seconds_of_marks(self) -> list[float]:
        """Since the first one. Devices tell short times more exactly than long ones."""
        at = [0.0]
        for mark, following in zip(self._marks, self._marks[1:], strict=False):
            at.append(at[-1] + _seconds_between(mark, following))
        return at


def _copy_by(
    func: OpOverload, args: Any, kwargs: Any
) -> tuple[torch.Tensor, torch.device, bool] | None:
    """Source, target and `non_blocking` of an operator that copies; None: it does not."""
    if func._schema.name == "aten::_to_copy":
        target = kwargs.get("device")
        target = args[0].device if target is None else torch.device(target)
        return args[0], target, bool(kwargs.get("non_blocking", False))
    if func._schema.name == "aten::copy_":
        return args[1], args[0].device, bool(args[2] if len(args) > 2 else False)
    return None


def _same_device(named: torch.device, device: torch.device) -> bool:
    """Whether a device that may be named without a number ("cuda") is this one."""
    if named.type != device.type or named.index is not None:
        return named == device
    return device.index == torch.accelerator.current_device_index()


class _Times:
    """Times in which something happened. The questions come in the order of time."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = deque(sorted((span.start, span.end) for span in spans))

    def between(self, begin: float, end: float) -> float:
        """Seconds between two times in which any of them lies."""
        found, until = 0.0, begin
        for start, stop in self._spans:
            if start >= end:
                break
            found += max(0.0, min(stop, end) - max(start, until))
            until = max(until, min(stop, end))
        while self._spans and self._spans[0][1] <= end:
            self._spans.popleft()
        return found


def _events_of(device: torch.device) -> Callable[[], torch.Event]:
    """What records an event on the device's current stream."""

    def mark() -> torch.Event:
        event = torch.Event(device, enable_timing=True)
        event.record(torch.accelerator.current_stream(device))
        return event

    return mark


def _seconds_between(before: Any, behind: Any) -> float:
    if isinstance(before, float):
        return float(behind - before)
    before.synchronize()
    behind.synchronize()
    return float(before.elapsed_time(behind)) / 1e3
