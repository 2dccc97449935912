# SPDX-License-Identifier: Apache-2.0
"""Records when copies, reads, stalls and operators run. Lets torch.profiler do so, too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from distorch import _native, _ops
from distorch.errors import PlacementError, SpecError
from distorch.runtime.distribution import distribution_of
from distorch.timeline import Span, Timeline

_tracing = threading.Lock()  # held while a trace is running


@contextmanager
def trace(module: nn.Module, path: str | os.PathLike[str] | None = None) -> Iterator[Timeline]:
    """Records what happens inside of the `with` block.

    Example::

        with distorch.trace(model, "step.json") as timeline:
            model(x)
        print(timeline)
        timeline.plot("step.svg")

    There is one track for each stream: copies over each link, stalls of the compute stream (or of
    the waiting thread), operators on sharded weights, reads of files. Times are the device's own.
    The timeline is filled, and the file is written, also when the block ends in an error.

    Args:
        module: A distributed module.
        path: A JSON file to write, for ui.perfetto.dev or chrome://tracing. None writes none.

    Returns:
        A context manager that gives a `Timeline`.

    Raises:
        PlacementError: The module is not distributed, or another trace is running.
        SpecError: `path` is no path.
        FileNotFoundError: Its folder is not there.
    """
    compute = distribution_of(module).plan.compute
    if path is not None and not isinstance(path, str | os.PathLike):
        raise SpecError(f"trace: expected the path of a JSON file, got {path!r:.80}")
    if path is not None and not (folder := Path(path).parent).is_dir():
        raise FileNotFoundError(f"trace: the folder {str(folder)!r} is not there; make it")
    if not _tracing.acquire(blocking=False):
        raise PlacementError(
            "a trace is running already (record_step makes one, too): end it before the next one"
        )
    try:
        _native.start_trace(compute)
        timeline = Timeline()
        try:
            yield timeline
        finally:
            timeline.spans += (Span(*span) for span in _native.stop_trace())
            if path is not None:
                timeline.save(path)
    finally:
        _tracing.release()


@contextmanager
def profiling(module: nn.Module) -> Iterator[None]:
    """Lets torch.profiler record shapes, stacks and modules of a distributed module.

    With these, the profiler notes the address of every tensor that it meets, and a sharded weight
    answers that with an error. In this block the address is 0. Open it first, so that the profiler
    stops inside of it::

        with distorch.profiling(model), profile(record_shapes=True) as prof:
            model(x)

    Fetches are in every profile, as "distorch::fetch <weight>".

    Raises:
        PlacementError: The module is not distributed.
    """
    distribution_of(module)
    weights = [p for p in module.parameters() if _ops.is_sharded(p)]
    for weight in weights:
        _ops.show_address(weight, True)
    try:
        yield
    finally:
        for weight in weights:
            if _ops.is_sharded(weight):
                _ops.show_address(weight, False)
