# SPDX-License-Identifier: Apache-2.0
"""The CUDA runtime that torch has loaded, called from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

TO_DEVICE = 1  # cudaMemcpyHostToDevice
NO_TIMING = 2  # cudaEventDisableTiming
PORTABLE = 1  # cudaHostAllocPortable, cudaHostRegisterPortable


def _loaded() -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libcudart" in path:
            return path
    raise RuntimeError("torch has loaded no libcudart")


class Runtime:
    """Errors are raised in the runtime's words."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(_loaded())
        self.library.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            self.library.cudaGetLastError()
            text = self.library.cudaGetErrorString(status)
            raise RuntimeError(f"{name}: {text.decode()} ({status})")

    def host_alloc(self, nbytes: int) -> int:
        pointer = ctypes.c_void_p()
        self.call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes), PORTABLE)
        assert pointer.value is not None
        return pointer.value

    def host_free(self, address: int) -> None:
        self.call("cudaFreeHost", ctypes.c_void_p(address))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.call("cudaMemcpyAsync", ctypes.c_void_p(target), ctypes.c_void_p(source),
                  ctypes.c_size_t(nbytes), TO_DEVICE, ctypes.c_void_p(stream))  # fmt: skip

    def stream(self) -> int:
        found = ctypes.c_void_p()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(found), 1)
        assert found.value is not None
        return found.value

    def captured(self, mode: int, address: int, work: Callable[[], object]) -> None:
        """Captures two memsets on a new stream, and does some work between them.

        Not by torch.cuda.graph: a capture that breaks leaves PyTorch's allocator in its middle.
        """
        stream, graph = ctypes.c_void_p(self.stream()), ctypes.c_void_p()
        memset = (ctypes.c_void_p(address), 0, ctypes.c_size_t(64), stream)
        self.call("cudaStreamBeginCapture", stream, mode)
        try:
            self.call("cudaMemsetAsync", *memset)
            work()
            self.call("cudaMemsetAsync", *memset)
        finally:
            self.call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self.call("cudaGraphDestroy", graph)

    def event(self, flags: int = NO_TIMING) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        self.call("cudaEventCreateWithFlags", ctypes.byref(found), flags)
        return found


def said(work: Any) -> Any:
    """What a call gives, or its error in words."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
