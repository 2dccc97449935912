# SPDX-License-Identifier: Apache-2.0
"""What events cost the host, in nanoseconds a call."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

from .cudart import NO_TIMING, Runtime, said

_CALLS = 2000


def nanoseconds(work: Callable[[int], object]) -> float:
    """The fastest of five turns, so that an interrupted one does not count."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter_ns()
        for index in range(_CALLS):
            work(index)
        best = min(best, (time.perf_counter_ns() - start) / _CALLS)
        torch.cuda.synchronize()
    return best


def costs(device: torch.device) -> dict[str, Any]:
    return {"by ctypes, ns": _of_the_runtime(), "by torch, ns": _of_torch(device)}


def _of_the_runtime() -> dict[str, Any]:
    runtime = Runtime()
    library, stream = runtime.library, ctypes.c_void_p(runtime.stream())
    plain = [runtime.event() for _ in range(_CALLS)]
    timed = [runtime.event(0) for _ in range(_CALLS)]
    number, milliseconds = ctypes.c_int(), ctypes.c_float()
    found = {
        # Of each figure, this much is the way from Python to C.
        "a call that does nothing": lambda i: library.cudaRuntimeGetVersion(ctypes.byref(number)),
        "record": lambda i: library.cudaEventRecord(plain[i], stream),
        "record, timed": lambda i: library.cudaEventRecord(timed[i], stream),
        "query": lambda i: library.cudaEventQuery(plain[i]),
        "stream waits": lambda i: library.cudaStreamWaitEvent(stream, plain[i], 0),
        "elapsed": lambda i: library.cudaEventElapsedTime(
            ctypes.byref(milliseconds), timed[i - 1], timed[i]
        ),
    }
    result = {name: said(lambda work=work: _checked(work)) for name, work in found.items()}
    result["create and destroy"] = said(lambda: _checked(lambda i: _lived(runtime)))
    return result


def _checked(work: Callable[[int], int]) -> float:
    """Of calls that give a status: what fails would be fast, and say nothing."""
    status = work(1)
    if status != 0:
        raise RuntimeError(f"status {status}")
    return nanoseconds(work)


def _lived(runtime: Runtime) -> int:
    event = ctypes.c_void_p()
    status: int = runtime.library.cudaEventCreateWithFlags(ctypes.byref(event), NO_TIMING)
    return status or int(runtime.library.cudaEventDestroy(event))


def _of_torch(device: torch.device) -> dict[str, Any]:
    stream = torch.Stream(device=device)
    plain = [torch.Event(device) for _ in range(_CALLS)]
    timed = [torch.Event(device, enable_timing=True) for _ in range(_CALLS)]
    found = {
        # It makes CUDA's event when it is recorded.
        "create and destroy, never recorded": lambda i: torch.Event(device),
        "record": lambda i: plain[i].record(stream),
        "record, timed": lambda i: timed[i].record(stream),
        "query": lambda i: plain[i].query(),
        "stream waits": lambda i: stream.wait_event(plain[i]),
        "create, record and destroy": lambda i: torch.Event(device).record(stream),
    }
    return {name: said(lambda work=work: nanoseconds(work)) for name, work in found.items()}
