# SPDX-License-Identifier: Apache-2.0
"""Originals that are read while others are merged."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from distorch import _ops
from distorch.formats.stored import StoredTensor

_READERS = 2  # one read begins while the last parts of another come


class ReadAhead:
    """Stored tensors, the next ones read while one is used; None is passed through."""

    def __init__(self, wanted: Sequence[StoredTensor | None]) -> None:
        self._wanted = wanted
        room = max((stored.room for stored in wanted if stored is not None), default=0)
        count = min(_READERS + 1, sum(stored is not None for stored in wanted))
        self._buffers = [_ops.host_tensor((room,), torch.uint8) for _ in range(count)]
        self._reads: list[Future[torch.Tensor] | None] = []
        self._taken = 0
        self._begun = 0

    def __enter__(self) -> ReadAhead:
        self._threads = ThreadPoolExecutor(_READERS, "distorch-read")
        for _ in range(_READERS):
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _start(self) -> None:
        index = len(self._reads)
        if index >= len(self._wanted):
            return
        stored, read = self._wanted[index], None
        if stored is not None:
            buffer = self._buffers[self._begun % len(self._buffers)]
            read = self._threads.submit(stored.read, buffer)
            self._begun += 1
        self._reads.append(read)

    def next(self) -> torch.Tensor | None:
        """The next one, valid until the one after it is asked for."""
        read = self._reads[self._taken]
        self._taken += 1
        self._start()
        return None if read is None else read.result()
