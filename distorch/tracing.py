# SPDX-License-Identifier: Apache-2.0
"""What happened when: copies, stalls and operators as a Chrome / Perfetto trace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from distorch import _native, _ops
from distorch.errors import PlacementError, SpecError
from distorch.runtime.distribution import distribution_of

_tracing = False


@contextmanager
def trace(module: nn.Module, path: str | os.PathLike[str]) -> Iterator[None]:
    """Writes what happens inside of the `with` block to a file for Perfetto or chrome://tracing.

    Example::

        with distorch.trace(model, "step.json"):
            model(x)

    There is one row for each stream: copies over each link, stalls of the compute stream (or of the
    waiting thread), operators on sharded weights, reads of each file. Times are the device's own.
    The file is written also when the block ends in an error.

    Args:
        module: A distributed module.
        path: The JSON file to write.

    Raises:
        PlacementError: The module is not distributed, or another trace is running.
        SpecError: `path` is no path.
        FileNotFoundError: Its folder is not there.
    """
    global _tracing  # noqa: PLW0603
    compute = distribution_of(module).plan.compute
    if not isinstance(path, str | os.PathLike):
        raise SpecError(f"trace: expected the path of a JSON file, got {path!r:.80}")
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"trace: the folder {str(target.parent)!r} is not there; make it")
    if _tracing:
        raise PlacementError("a trace is running already: end it before the next one")
    _tracing = True
    _native.start_trace(compute)
    try:
        yield
    finally:
        _tracing = False
        spans = _native.stop_trace()
        target.write_text(json.dumps({"traceEvents": _events(spans)}))


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


def _events(spans: list[tuple[str, str, float, float, int]]) -> list[dict[str, object]]:
    """Complete events in microseconds, a row for each track, in the order of the tracks' names."""
    tracks = sorted({track for track, *_ in spans})
    rows = {track: row for row, track in enumerate(tracks, start=1)}
    names: list[dict[str, object]] = [
        {"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": track}}
        for track, row in rows.items()
    ]
    found: list[dict[str, object]] = []
    for track, name, start, end, nbytes in sorted(spans, key=lambda span: span[2]):
        seconds = end - start
        details: dict[str, object] = {}
        if nbytes:
            details = {"bytes": nbytes, "GB/s": round(nbytes / max(seconds, 1e-12) / 1e9, 3)}
        found.append({"ph": "X", "pid": 1, "tid": rows[track], "name": name, "ts": start * 1e6,
                      "dur": seconds * 1e6, "args": details})  # fmt: skip
    return [*names, *found]
