# SPDX-License-Identifier: Apache-2.0
"""Patches on a module's weights, and the merge that defines their result.

W' = round_once(float32(W) + sum of strength * delta), deltas in the order given, each computed in
float32 or better; rounded to nearest even once. What replaces a weight takes the place of W and of
all that was added before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distorch import _ops
from distorch.errors import FormatError
from distorch.lora.kinds import Kind
from distorch.lora.products import ProductKind

# Of what is not low rank; a delta is then exact to the last bit of the sum in float32.
_WIDE = torch.float64
_WIDE_NUMBERS = 1 << 20  # of a weight, at one time


@dataclass(frozen=True, eq=False)
class Patch:
    """One LoRA's part for rows of one weight, from `first_row` on."""

    weight: str
    kind: Kind
    first_row: int
    part: bool  # of a fused weight: it may have fewer rows
    stem: str
    label: str
    all_ends: bool = False  # meant for every weight that is tied to this one

    def complaint(self, what: str) -> FormatError:
        """An error that names the patch."""
        return FormatError(
            f"{self.label}: {self.kind.name} for {self.weight!r} ({self.stem}): {what}"
        )


Applied = list[tuple[Patch, float]]  # with strengths, in the order of adding


@dataclass(eq=False)
class ResolvedLora:
    """One file's patches on one module, and what of it fits nothing, or has another size."""

    label: str
    patches: list[Patch]
    unmatched: list[str]
    elsewhere: list[str]  # stems of other parts of the pipeline
    targets: int
    misfits: list[Patch] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # stems of a branch that this module lacks
    complaints: list[str] = field(default_factory=list)  # what to say of misfits and unmatched
    source: Any = None  # what it was read from, as the user gave it

    @property
    def left_out(self) -> list[str]:
        """Stems that change nothing, and were meant for this module as far as one can tell."""
        return [*self.unmatched, *(patch.stem for patch in self.misfits), *self.absent]


class Patches:
    """What changes which weight: patches with their strengths, in the order given."""

    def __init__(self) -> None:
        self._by_weight: dict[str, list[tuple[Patch, float]]] = {}

    def add(self, lora: ResolvedLora, strength: float) -> None:
        """One more LoRA, after those that are there."""
        for patch in lora.patches:
            self._by_weight.setdefault(patch.weight, []).append((patch, strength))

    def width(self, names: Sequence[str]) -> int:
        """Columns that the widest patch of a weight with these names has, also at strength 0; 0
        where that is not known.
        """
        found = [
            patch.kind.columns() for name in names for patch, _ in self._by_weight.get(name, ())
        ]
        return max((columns for columns in found if columns is not None), default=0)

    def of(self, names: Sequence[str]) -> list[tuple[Patch, float]]:
        """The patches of a weight with these names; those of strength 0 are none."""
        found = [entry for name in names for entry in self._by_weight.get(name, ())]
        return [(patch, strength) for patch, strength in found if strength != 0]


def are_products(
    patches: Sequence[tuple[Patch, float]], rows: StoredRows | None, shape: Sequence[int]
) -> bool:
    """Whether the merge kernel can put all of them on a weight of that shape that is stored as
    `rows` says (None: as it is).
    """
    if not all(isinstance(patch.kind, ProductKind) for patch, _ in patches):
        return False
    columns = _columns_of(patches, shape)
    return columns is not None and (rows is None or rows.whole_rows(shape, columns))


def _columns_of(patches: Sequence[tuple[Patch, float]], shape: Sequence[int]) -> int | None:
    """Columns of the matrix that the kernel patches. Experts are patched one by one, and their
    stack is the matrix [experts * outputs, inputs] then. None where patches want two matrices.
    """
    found = {
        int(patch.kind.down.shape[-1])
        for patch, _ in patches
        if isinstance(patch.kind, ProductKind)
    }
    return found.pop() if len(found) == 1 else None if found else _ops.as_matrix(shape)[1]


def low_rank_terms(
    patches: Sequence[tuple[Patch, float]], *, kept: bool = False
) -> _ops.Terms | None:
    """The patches as terms of the merge kernel, or None where one of them is no product, or they
    are for several matrices. `kept`: they are for more than one merge.
    """
    terms, columns = _ops.Terms(), set[int]()
    for patch, strength in patches:
        kind = patch.kind
        if not isinstance(kind, ProductKind):
            return None
        if kept:
            kind.keep_factors()
        columns.add(int(kind.down.shape[-1]))
        for up, down, first_row in kind.pieces(patch.first_row):
            terms.add(up, down, strength * kind.scale, first_row)
    return terms if len(columns) < 2 else None


@dataclass(frozen=True)
class StoredRows:
    """How a weight is stored where that is not its own dtype: `code` and what `_ops.decode` wants.

    `scales` float32 [grid rows, grid columns], one for `block` (rows, columns) elements; `table`
    float32 [n]; `rotation` in columns, 0 for none.
    """

    code: str
    scales: Tensor | None = None
    block: tuple[int, int] = (1, 1)
    table: Tensor | None = None
    rotation: int = 0

    @property
    def are_plain(self) -> bool:
        """Whether the code says all: no scales, and nothing turned."""
        return self.scales is None and self.rotation == 0

    @property
    def options(self) -> dict[str, Any]:
        """What `_ops.decode` and `_ops.decoded` want beside the code."""
        return {
            "scales": self.scales, "block": self.block, "table": self.table,
            "rotation": self.rotation,
        }  # fmt: skip

    def whole_rows(self, shape: Sequence[int], columns: int | None = None) -> bool:
        """Whether each row of a weight of that shape has its own bytes; of the matrix with so many
        `columns`, where it is to be another one than usual.
        """
        usual = _ops.as_matrix(shape)[1]
        columns = usual if columns is None else columns
        if columns % _ops.block_elements(self.code) != 0:
            return False
        one_scale = self.scales is None or self.scales.numel() == 1
        return columns == usual or (one_scale and self.rotation == 0)

    def of_matrix(self, rows: int, columns: int) -> StoredRows:
        """The same of another matrix (see `whole_rows`): one scale is for the whole of it."""
        if self.scales is None or self.scales.numel() > 1:
            return self
        return replace(self, scales=self.scales.reshape(1, 1), block=(rows, columns))


def merge(
    patches: Sequence[tuple[Patch, float]],
    stored: Tensor,
    dtype: torch.dtype,
    rows: StoredRows | None = None,
    *,
    shape: Sequence[int] | None = None,
    into: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """The patched weight, in `dtype`, on the device of `stored`. FormatError on NaN and inf.

    `shape` of the weight, where it is not that of `stored` (blocks).

    `stored` is the base: plain numbers, or scaled ones if `rows` says so. The result may be written
    to `into` (plain, contiguous, of its shape, dtype and device), or with `in_place` to `stored`.
    """
    if rows is None:
        rows = StoredRows(_ops.code_of(stored.dtype))
    sizes = tuple(stored.shape if shape is None else shape)
    columns = _columns_of(patches, sizes) or _ops.as_matrix(sizes)[1]
    if not rows.whole_rows(sizes, columns):
        stored, rows = _plain(stored, rows, sizes), StoredRows("float32")
    terms = low_rank_terms(patches)
    kernel_dtype = dtype if dtype in _ops.DECODED_DTYPES else torch.float32
    if dtype.itemsize == 8 or stored.dtype.itemsize == 8 or stored.is_complex():
        terms = None
    if terms is None:
        return _merge_wide(patches, _plain(stored, rows, sizes), dtype)
    same = in_place and stored.dtype == dtype == kernel_dtype and rows.are_plain
    matrix = math.prod(sizes) // max(columns, 1), columns
    rows = rows.of_matrix(*matrix)
    if into is None or into.dtype != kernel_dtype or into.device != stored.device:
        into = stored if same else _ops.empty_beside(stored, sizes, kernel_dtype)
    finite = torch.ones(1, dtype=torch.bool, device=stored.device)
    _ops.decode(into.view(matrix), stored, rows.code, **rows.options, terms=terms, finite=finite)
    if not bool(finite):
        raise _not_finite(patches)
    return into.to(dtype)


def _plain(stored: Tensor, rows: StoredRows, shape: Sequence[int]) -> Tensor:
    """The numbers of a base, in float32 if they are not plain."""
    if rows.code == _ops.code_of(stored.dtype) and rows.are_plain:
        return stored
    into = _ops.empty_beside(stored, shape, torch.float32)
    matrix = _ops.as_matrix(shape) if rows.whole_rows(shape) else (1, into.numel())
    _ops.decode(into.view(matrix), stored, rows.code, **rows.options)
    return into


def _merge_wide(patches: Sequence[tuple[Patch, float]], base: Tensor, dtype: torch.dtype) -> Tensor:
    """The same where one of the patches is no product: some rows after the other, so that what is
    wide is never the whole of a big weight, if all patches can be cut.
    """
    result = _ops.empty_beside(base, base.shape, dtype)
    rows, into = (base.reshape(1), result.view(1)) if base.dim() == 0 else (base, result)
    count = rows.shape[0]
    step = math.lcm(*(patch.kind.cuts for patch, _ in patches)) or count
    if rows.dim() < 2 or any(patch.first_row % step for patch, _ in patches):
        step = count
    at_once = max(step, _WIDE_NUMBERS // max(rows[:1].numel(), 1) // max(step, 1) * step)
    for begin in range(0, count, max(at_once, 1)):
        part = slice(begin, min(begin + at_once, count))
        into[part] = _merge_rows(patches, rows[part], begin, count, dtype)
    return result


def _merge_rows(
    patches: Sequence[tuple[Patch, float]], base: Tensor, begin: int, count: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a weight of `count` rows, from `begin` on, with their patches."""
    wide = torch.complex128 if base.is_complex() else _WIDE
    if base.device.type == "mps":  # has no float64
        wide = torch.float32
    weight = base.to(wide, copy=True)
    result = weight.clone()
    for patch, strength in patches:
        first, kind = patch.first_row, patch.kind
        own = (kind.rows() if patch.part else None) or count - first
        low, high = max(first, begin), min(first + own, begin + base.shape[0])
        if low >= high:
            continue
        if (low, high) != (first, first + own):
            kind = kind.some_rows(low - first, high - first)
        part = slice(low - begin, high - begin)
        delta = kind.delta(weight[part])
        if not bool(torch.isfinite(delta).all()):
            raise patch.complaint("its delta has NaN or inf values")
        if kind.replaces:  # what is there, with earlier patches
            kind.put(weight[part])
            kind.put(result[part])
        else:
            result[part] += strength * delta
    # The sum is float32's before it is rounded to what is narrower.
    return result.to(dtype) if dtype.itemsize >= 4 else result.float().to(dtype)


def _not_finite(patches: Sequence[tuple[Patch, float]]) -> FormatError:
    for patch, _ in patches:
        factors = patch.kind.factors() if isinstance(patch.kind, ProductKind) else ()
        if any(not bool(torch.isfinite(factor).all()) for factor in factors):
            return patch.complaint("its factors have NaN or inf values")
    return patches[0][0].complaint("its delta has NaN or inf values")
