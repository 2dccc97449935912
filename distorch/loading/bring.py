# SPDX-License-Identifier: Apache-2.0
"""From the file to the donors: reading, patching and leaving overlap.

Note [The pipeline of load]
A thread reads the next tensors, this one patches them, a third brings them to their donors. What is
between the first and the last is never more than two of the largest tensors: a tensor takes its
bytes from that budget before it is read and gives them back when it is in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from distorch import _donors, _ops
from distorch.display.progress import Progress, progress_of
from distorch.loading.job import Job
from distorch.lora import StoredRows, low_rank_terms
from distorch.patching import merged_value, with_rows
from distorch.planner import Plan

_READERS = 2  # one read begins while the last parts of another come
_PLACED_LATELY = 4


class _Budget:
    """Bytes of tensors on their way: at most `total` at one time.

    Room is given in the order of the tensors: what is needed first is not kept waiting by what is
    needed later, which would wait for it.
    """

    def __init__(self, total: int) -> None:
        self._left = total
        self._turn = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, turn: int, nbytes: int) -> bool:
        """Waits for room, and for all turns before. False when nobody wants anything any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._turn == turn and self._left >= nbytes)
            )
            self._left -= nbytes
            self._turn += 1
            self._changed.notify_all()
            return not self._closed

    def give(self, nbytes: int) -> None:
        """Gives room back."""
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@contextmanager
def _threads(budget: _Budget) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Threads that read, one that writes; all are gone afterwards, come what may."""
    with (
        ThreadPoolExecutor(_READERS, "distorch-read") as reader,
        ThreadPoolExecutor(1, "distorch-place") as placer,
    ):
        try:
            yield reader, placer
        finally:
            budget.close()
            for pool in (reader, placer):
                pool.shutdown(wait=False, cancel_futures=True)


def bring_all(jobs: list[Job], plan: Plan, progress: Progress) -> list[torch.Tensor]:
    """Every job's weight at its place, in the order of the jobs."""
    compute = torch.device(plan.compute)
    largest = max((_room(job, plan) for job in jobs), default=0)
    budget = _Budget(2 * largest)
    total = sum(job.stored.nbytes for job in jobs)
    values: list[Future[torch.Tensor]] = []
    with (
        progress_of(progress, total, "loading") as done,
        _threads(budget) as (reader, placer),
    ):
        reads: list[Future[torch.Tensor | None] | None] = [
            reader.submit(_read, job, plan, budget, turn) for turn, job in enumerate(jobs)
        ]
        for job in jobs:  # while the first are read
            if job.at_fetch:
                job.terms = low_rank_terms(job.patches, kept=True)
        for index, job in enumerate(jobs):
            read = reads[index]
            assert read is not None
            value = read.result()
            if value is not None and not job.is_stored_form:
                value = _made(job, value, compute)
            values.append(placer.submit(_place, job, value, plan, budget))
            reads[index] = read = value = None  # nobody but the placer holds it now
            for placed in values[-_PLACED_LATELY:]:
                if placed.done():
                    placed.result()  # its error is known now, not at the end
            done(job.stored.nbytes)
        return [value.result() for value in values]


def _room(job: Job, plan: Plan) -> int:
    """Bytes that it takes on its way, above those that stay."""
    stays_where_read = plan.compute == plan.placement[job.name] == "cpu"
    if stays_where_read and job.stored.nbytes == job.nbytes:
        return 0
    return max(job.stored.nbytes, job.nbytes)


def _stays_in_file(job: Job, plan: Plan) -> bool:
    """Whether the checkpoint itself is the donor."""
    ranged = job.stored.in_one_range and job.stored.nbytes > 0
    return plan.placement[job.name] == "disk" and job.is_stored_form and ranged


def _read(job: Job, plan: Plan, budget: _Budget, turn: int) -> torch.Tensor | None:
    stays = _stays_in_file(job, plan)
    if not budget.take(turn, 0 if stays else _room(job, plan)):
        raise RuntimeError("loading has ended")
    return None if stays else job.stored.read()


def _made(job: Job, stored: torch.Tensor, compute: torch.device) -> torch.Tensor:
    """The weight itself, where it is not kept as the file has it."""
    if not job.patches and job.rows is None and job.columns is None:
        return stored.to(job.dtype)
    shape = job.stored.shape
    return merged_value(
        job.patches, stored, job.rows, job.result_dtype, compute, shape=shape, width=job.columns
    )


def _place(job: Job, value: torch.Tensor | None, plan: Plan, budget: _Budget) -> torch.Tensor:
    """The weight at its place; `value` None: it stays in the file."""
    compute, target = torch.device(plan.compute), plan.placement[job.name]
    stored = job.stored
    if value is None:
        shape = (stored.nbytes,) if stored.block_type else stored.shape
        placed = _ops.shard_file(
            stored.path, stored.offset, shape, stored.dtype, compute=compute, name=job.name
        )
        return _decoded(job, placed)
    try:
        if stored.nbytes == 0:
            return value.to(compute)
        decodes = job.rows is not None and job.is_stored_form
        if target == plan.compute and not decodes and not (job.at_fetch and job.patches):
            return value.to(compute)
        return _decoded(job, _donors.shard_on(target, value, compute, job.name))
    finally:
        budget.give(_room(job, plan))


def _decoded(job: Job, placed: torch.Tensor) -> torch.Tensor:
    """A weight in the form of the file, with what its fetches have to do."""
    if not job.is_stored_form:
        return placed
    if job.rows is not None:
        placed = with_rows(placed, job.rows, job.result_dtype, job.stored.shape, job.name)
    terms = job.terms
    if terms is None or not len(terms):
        return placed
    if job.rows is None and job.stored.dtype in _ops.DECODED_DTYPES:
        return _ops.patched(placed, terms)
    if job.rows is None:
        rows = StoredRows(_ops.code_of(job.stored.dtype))
        placed = with_rows(placed, rows, job.result_dtype, job.stored.shape, job.name)
    _ops.set_patches(placed, terms)
    return placed
