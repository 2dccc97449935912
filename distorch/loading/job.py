# SPDX-License-Identifier: Apache-2.0
"""One tensor of a checkpoint, on its way into a module."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

import torch

from distorch import _ops
from distorch.formats.checkpoint import weight_info
from distorch.formats.stored import StoredTensor
from distorch.lora import Applied, StoredRows
from distorch.planner import WeightInfo
from distorch.runtime import groups


@dataclass
class Job:
    """One tensor to bring: where it is stored and every place in the module that it fills.

    `rows` if its numbers have scales or are blocks; `dtype` what its parameter will be unpatched;
    `patches` on it, put on as `terms` when it is fetched if `at_fetch`; `widened` if it is decoded
    for good; `columns` that a LoRA gives it, if not its own.
    """

    stored: StoredTensor
    members: list[groups.Member]
    dtype: torch.dtype
    buffer: groups.Buffer | None = None
    rows: StoredRows | None = None
    patches: Applied = field(default_factory=list)
    at_fetch: bool = False
    terms: _ops.Terms | None = None
    patched_dtype: torch.dtype | None = None
    widened: bool = False
    columns: int | None = None

    @property
    def name(self) -> str:
        return self.buffer.name if self.buffer is not None else self.members[0].name

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    @property
    def is_stored_form(self) -> bool:
        """Whether the donor keeps the file's own bytes."""
        if self.widened or self.columns is not None or (self.patches and not self.at_fetch):
            return False
        return self.rows is not None or self.dtype == self.stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes at its place."""
        if self.is_stored_form:
            return self.stored.nbytes
        columns = self.stored.shape[1:] if self.columns is None else (self.columns,)
        return prod((*self.stored.shape[:1], *columns)) * self.result_dtype.itemsize

    @property
    def module_dtype(self) -> torch.dtype:
        """What the module computes the weight in, as far as that is known."""
        return self.dtype if self.rows is not None else self.members[0].parameter.dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """What the weight's values are."""
        patched = self.patches or self.columns is not None
        return self.patched_dtype if patched and self.patched_dtype else self.dtype

    def info(self) -> WeightInfo:
        """The tensor as the planner sees it."""
        info = weight_info(self.stored, self.name, tuple(self.names[1:]))
        in_file = info.in_file and self.is_stored_form
        return replace(info, nbytes=self.nbytes, in_file=in_file)
