# SPDX-License-Identifier: Apache-2.0
"""Patches around other patches: DoRA, and patches on weights of another layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from distorch.lora.kinds import DifferenceKind, Kind, ReplacementKind, RowsKind, as_like
from distorch.lora.products import LowRankKind


@dataclass(eq=False)
class AroundKind(Kind):
    """A patch around another one, whose shape it has."""

    inner: Kind

    def shape(self) -> str:
        return self.inner.shape()

    def rows(self) -> int | None:
        return self.inner.rows()


@dataclass(eq=False)
class DecomposedKind(AroundKind):
    """DoRA: magnitude * (weight + inner) / norm(weight + inner), per output row or per column.

    `magnitude` [rows, 1] or [1, columns]; of one dimension: what its length says, rows before
    columns.
    """

    magnitude: Tensor
    name = "DoRA"

    def delta(self, weight: Tensor) -> Tensor:
        moved = weight + self.inner.delta(weight)
        magnitude = as_like(self.magnitude, weight).flatten()
        by_row = magnitude.numel() == weight.shape[0] and not self._says_columns(weight)
        kept = 0 if by_row else 1
        others = [dim for dim in range(weight.dim()) if dim != kept]
        norm: Tensor = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        norm = torch.where(norm == 0, 1, norm)  # a row of zeros has no direction, and stays
        return moved * (magnitude.reshape(norm.shape) / norm) - weight

    def _says_columns(self, weight: Tensor) -> bool:
        shape = self.magnitude.shape
        return len(shape) > 1 and shape[0] == 1 and shape[1] == weight.shape[1] > 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.inner.fits(shape) and self.magnitude.numel() in shape[:2]

    def columns(self) -> int | None:
        return self.inner.columns()

    @property
    def by_row(self) -> bool:
        """Whether there is a magnitude for each row, as far as that is known without the weight."""
        shape, inner = self.magnitude.shape, self.inner
        by_column = len(shape) > 1 and shape[0] == 1 < shape[1]
        if by_column and isinstance(inner, LowRankKind):
            by_column = inner.down.shape[1] % shape[1] == 0
        return self.magnitude.numel() == self.rows() and not by_column

    @property
    def cuts(self) -> int:
        return self.inner.cuts if self.by_row else 0

    def _rows_of(self, begin: int, end: int) -> DecomposedKind:
        magnitude = self.magnitude.flatten()
        return DecomposedKind(self.inner.some_rows(begin, end), magnitude[begin:end])


@dataclass(eq=False)
class PaddedKind(AroundKind):
    """A patch made for the first columns of a weight."""

    own: int  # columns

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def replaces(self) -> bool:  # type: ignore[override]
        return self.inner.replaces

    def put(self, into: Tensor) -> None:
        self.inner.put(into[:, : self.own])

    def delta(self, weight: Tensor) -> Tensor:
        added = torch.zeros_like(weight)
        added[:, : self.own] = self.inner.delta(weight[:, : self.own])
        return added

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and self.inner.fits((shape[0], self.own))

    @property
    def cuts(self) -> int:
        return self.inner.cuts

    def _rows_of(self, begin: int, end: int) -> PaddedKind:
        return PaddedKind(self.inner.some_rows(begin, end), self.own)


def padded(kind: Kind, own: int, columns: int) -> Kind:
    """The same for a weight [rows, columns], of which it leaves the last columns as they are.
    `own`: columns that it was made for, where it does not know them.
    """
    own = kind.columns() or own
    if columns <= own:
        return kind
    if isinstance(kind, LowRankKind):  # it stays a product
        return replace(kind, down=functional.pad(kind.down, (0, columns - own)))
    if isinstance(kind, DecomposedKind) and kind.by_row:  # norms are those of whole rows
        return replace(kind, inner=padded(kind.inner, own, columns))
    return PaddedKind(kind, own)


@dataclass(eq=False)
class TurnedKind(Kind):
    """A patch made for [out, in] on a weight that its module keeps as [in, out]."""

    inner: Kind

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(weight.t()).t()

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and self.inner.fits(shape[::-1])

    def shape(self) -> str:
        return f"{self.inner.shape()}, turned over"


def turned(kind: Kind) -> Kind:
    """A patch made for [out, in] as one for [in, out]. Differences and replacements are made for
    the weight itself, and stay as they are.
    """
    if isinstance(kind, LowRankKind):
        return kind.transposed()
    if isinstance(kind, DifferenceKind | ReplacementKind | RowsKind):
        return kind
    return TurnedKind(kind)
