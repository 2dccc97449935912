# SPDX-License-Identifier: Apache-2.0
"""Records which weights each operator of a step uses, and how long it takes.

A dispatch mode sees every operator that reaches a device, with its arguments. A weight is known by
its storage, so views of it count as uses of it.

Time on a device is taken by events: one before and one behind each operator on weights. What the
device waited for weights in between is in the trace, and is taken off. A device that is idle also
waits for the host. The first event is then recorded just before the operator is issued, and the use
is marked: `predict` takes off what the host needs to issue one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distorch.errors import PlacementError
from distorch.prediction.step import Step, Use
from distorch.runtime.distribution import distribution_of
from distorch.runtime.groups import group_members, parts_of, shape_of
from distorch.timeline import Span, Timeline
from distorch.tracing import trace

_LOOKUPS = frozenset({"aten::embedding"})
_COPIES = frozenset({"aten::_to_copy", "aten::copy_"})


@contextmanager
def record_step(module: nn.Module) -> Iterator[Step]:
    """Records the step that runs inside of the `with` block.

    Example::

        model(x)  # once before, so that nothing is compiled or chosen while it is measured
        with distorch.record_step(model) as step:
            model(x)
        print(distorch.predict(model, step, "cuda:0,4gb;cpu,*"))

    The placement does not matter: what operators wait for weights is taken off. Operators inside of
    compiled code (torch.compile) are not seen. The step is filled when the block ends without an
    error.

    Args:
        module: A distributed module.

    Returns:
        A context manager that gives a `Step`.

    Raises:
        PlacementError: The module is not distributed, a trace is running, or the module was placed
            anew inside of the block.
    """
    placed = distribution_of(module)
    compute, plan = placed.plan.compute, placed.plan
    step = Step(compute)
    recorder = _Recorder(_names(module), torch.device(compute))
    with trace(module) as timeline, recorder:
        yield step
    if distribution_of(module).plan is not plan:
        raise PlacementError(
            "the module was placed anew while its step was recorded; record a step alone"
        )
    step.uses += recorder.uses(timeline)
    used = set(step.weights)
    groups = {group.name: group for group in group_members(module)}
    step.shapes |= {name: shape_of(groups[name].first) for name in groups if name in used}
    if compute == "cpu":
        for span in timeline.spans:
            if span.track == "decodes":
                step.decodes[span.name] = span.end - span.start


def _names(module: nn.Module) -> dict[int, list[str]]:
    """Storage -> first names of the weights in it."""
    found: dict[int, list[str]] = {}
    for group in group_members(module):
        for part in parts_of(group.first):
            found.setdefault(_storage(part), []).append(group.name)
    return found


def _storage(tensor: torch.Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)


class _Noted(NamedTuple):
    """A use, with two points in time in place of its seconds."""

    before: Any
    behind: Any
    use: Use


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every use."""

    def __init__(self, names: dict[int, list[str]], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._device = device
        self._on_host = device.type == "cpu"
        self._mark: Callable[[], Any] = time.perf_counter if self._on_host else _events_of(device)
        self._noted: list[_Noted] = []
        self._others = 0  # operators on no weight since the last mark, on a device
        self._others_idle = False  # the device, when the first of them was issued
        self._first: Any = None
        self._last: Any = None

    def __enter__(self) -> _Recorder:
        self._first = self._last = self._mark()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._end_others()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        given = (*args, *kwargs.values())
        if weights := tuple(dict.fromkeys(self._weights_in(given))):
            rows = args[1].numel() if func._schema.name in _LOOKUPS else 0
            return self._note(func, args, kwargs, Use(0.0, 1, weights, rows))
        if not self._on_host and (copied := self._copied_by(func, given)):
            return self._note(func, args, kwargs, Use(0.0, 1, copied=copied))
        if self._on_host:
            return self._note(func, args, kwargs, Use(0.0))
        if not self._others:
            self._others_idle = self._last.query()
        self._others += 1
        result = func(*args, **kwargs)
        if self._tells_the_host(given, result):
            self._end_others(host_waits=True)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, use: Use) -> Any:
        """Calls an operator, and notes it alone."""
        self._end_others()
        idle = not self._on_host and self._last.query()
        before = self._mark() if idle or self._on_host else self._last
        result = func(*args, **kwargs)
        self._last = self._mark()
        waits = not self._on_host and self._tells_the_host((*args, *kwargs.values()), result)
        self._noted.append(_Noted(before, self._last, use._replace(idle=idle, host_waits=waits)))
        return result

    def _end_others(self, host_waits: bool = False) -> None:
        """What ran since the last operator on weights becomes one use."""
        if not self._others:
            return
        now = self._mark()
        use = Use(0.0, self._others, idle=self._others_idle, host_waits=host_waits)
        self._noted.append(_Noted(self._last, now, use))
        self._last, self._others = now, 0

    def _weights_in(self, values: Iterable[Any]) -> Iterator[str]:
        for tensor in _tensors_in(values):
            for part in parts_of(tensor):
                if part.layout is torch.strided:
                    yield from self._names.get(_storage(part), ())

    def _copied_by(self, func: Any, given: Iterable[Any]) -> int:
        """Bytes that the operator copies from RAM to the compute device."""
        if func._schema.name not in _COPIES:
            return 0
        devices = [value for value in given if isinstance(value, torch.device)]
        tensors = list(_tensors_in(given))
        there = any(device.type == self._device.type for device in devices) or (
            tensors[0].device == self._device
        )
        return tensors[-1].nbytes if there and tensors[-1].device.type == "cpu" else 0

    def _tells_the_host(self, given: Iterable[Any], result: Any) -> bool:
        """Whether the host gets a number, or a tensor of its own, from tensors of the device."""
        results = list(_tensors_in((result,)))
        if results and all(tensor.device == self._device for tensor in results):
            return any(tensor.device.type == "cpu" for tensor in _tensors_in(given))
        return any(tensor.device == self._device for tensor in _tensors_in(given))

    def uses(self, timeline: Timeline) -> list[Use]:
        """What was noted, in seconds, without the waits that the trace has.

        The trace began just before the first mark. So a wait is taken off the use in whose time it
        lies, to within microseconds. A device that decodes meanwhile does half of each.
        """

        def times(*kinds: str) -> _Times:
            return _Times(span for span in timeline.spans if span.track.startswith(kinds))

        if self._on_host:
            waits = times("stalls", "decodes")
            waits_and_decodes = times("stalls", "decodes")
        else:
            waits, waits_and_decodes = times("stalls "), times("stalls ", "decodes ")
        found = []
        for before, behind, use in self._noted:
            begin, end = (_seconds_between(self._first, mark) for mark in (before, behind))
            waited = waits.between(begin, end)
            shared = waits_and_decodes.between(begin, end) - waited
            seconds = max(end - begin - waited - shared / 2, 0.0)
            found.append(use._replace(seconds=seconds))
        return found


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


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


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
