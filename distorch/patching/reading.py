"""Originals that are read while others are merged."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from distorch import _ops
from distorch.formats.safetensors import StoredTensor


class ReadAhead:
    """Stored tensors, each read while the one before is used; None is passed through."""

    def __init__(self, wanted: Sequence[StoredTensor | None]) -> None:
        self._wanted = wanted
        room = max((stored.room for stored in wanted if stored is not None), default=0)
        self._buffers = [_ops.host_tensor((room,), torch.uint8) for _ in range(2)] if room else []
        self._reads: list[Future[torch.Tensor] | None] = []
        self._taken = 0

    def __enter__(self) -> ReadAhead:
        self._thread = ThreadPoolExecutor(1, "distorch-read")
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _start(self) -> None:
        index = len(self._reads)
        if index >= len(self._wanted):
            return
        stored = self._wanted[index]
        buffer = self._buffers[index % 2] if self._buffers else None
        self._reads.append(None if stored is None else self._thread.submit(stored.read, buffer))

    def next(self) -> torch.Tensor | None:
        """The next one, valid until the one after it is asked for."""
        read = self._reads[self._taken]
        self._taken += 1
        self._start()
        return None if read is None else read.result()
