# SPDX-License-Identifier: Apache-2.0
"""What a patch adds to a weight, kind by kind.

Every kind has `delta(weight)`: what it adds at strength 1 to a weight that is given in the dtype of
the arithmetic (float64 where the device has it), same shape. Low-rank kinds also have factors,
which the merge kernel takes as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distorch import _ops
from distorch.errors import FormatError


def as_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A factor on the device and in the dtype of `like`."""
    return tensor.detach().to(like.device, like.dtype)


class Kind:
    """One LoRA's part for one weight (or for some rows of it)."""

    name = "patch"

    def delta(self, weight: Tensor) -> Tensor:
        """What strength 1 adds to `weight` (float32 or float64), same shape."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up [rows, rank], down [rank, columns]), float32, if up @ down is what is added."""
        return None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of that shape."""
        raise NotImplementedError

    def shape(self) -> str:
        """The shape that it was made for, in words."""
        raise NotImplementedError

    def rows(self) -> int | None:
        """Rows that it covers, where that is known without the weight."""
        return None

    @property
    def cuts(self) -> int:
        """Rows come in groups of this many, each of which can be patched alone; 0: only all."""
        return 0

    def some_rows(self, begin: int, end: int) -> Kind:
        """The part of it for rows [begin, end): a fused patch on one of several weights, or some
        of a big one. Both are multiples of `cuts`.
        """
        step = self.cuts
        if step == 0 or begin % step or end % step:
            raise FormatError(
                f"a {self.name} cannot be cut at rows {begin} to {end}"
                + (f", only at multiples of {step}" if step else "")
            )
        return self._rows_of(begin, end)

    def _rows_of(self, begin: int, end: int) -> Kind:
        raise NotImplementedError


def columns_of(shape: tuple[int, ...]) -> int:
    """Columns of a weight as a matrix: all dimensions but the first."""
    return math.prod(shape[1:])


@dataclass(eq=False)
class LowRankKind(Kind):
    """scale * up @ down; `up` [rows, rank], `down` [rank, columns], given in any floating dtype."""

    up: Tensor
    down: Tensor
    scale: float
    name = "LoRA"
    cuts = 1

    def __post_init__(self) -> None:
        self.up, self.down = (_flat(factor) for factor in (self.up, self.down))

    def factors(self) -> tuple[Tensor, Tensor]:
        # The scale goes with the strength, which the kernel multiplies by.
        return _in_float32(self.up), _in_float32(self.down)

    def keep_factors(self) -> None:
        """Makes both float32 for good: they are asked for again and again."""
        self.up, self.down = self.factors()

    def delta(self, weight: Tensor) -> Tensor:
        product = (as_like(self.up, weight) @ as_like(self.down, weight)) * self.scale
        return product.reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and (self.up.shape[0], self.down.shape[1]) == (
            shape[0],
            columns_of(shape),
        )

    def transposed(self) -> LowRankKind:
        """The same for a module that keeps its weight the other way round."""
        return LowRankKind(self.down.t(), self.up.t(), self.scale)

    def shape(self) -> str:
        return f"[{self.up.shape[0]}, {self.down.shape[1]}] of rank {self.up.shape[1]}"

    def rows(self) -> int:
        return int(self.up.shape[0])

    def _rows_of(self, begin: int, end: int) -> LowRankKind:
        self.keep_factors()  # all parts of a fused patch share them
        return LowRankKind(self.up[begin:end], self.down, self.scale)


def _flat(factor: Tensor) -> Tensor:
    """A factor as a matrix, in float32 if it was wider."""
    matrix = factor.detach().flatten(1)
    return matrix.float() if matrix.dtype.itemsize > 4 else matrix


def _in_float32(factor: Tensor) -> Tensor:
    if factor.dtype not in (torch.float16, torch.bfloat16) or factor.device.type != "cpu":
        return factor.float().contiguous()
    # Not by an operator of torch, whose threads would go on spinning, on cores that merges want.
    into = torch.empty(factor.shape, dtype=torch.float32)
    _ops.decode(into, factor.contiguous(), _ops.code_of(factor.dtype))
    return into


@dataclass(eq=False)
class CoreKind(Kind):
    """LoRA of a convolution with a core between its factors (`lora_mid`), in Tucker's form.

    `core` [rank, rank, ...], `up` [rows, rank], `down` [rank, channels].
    """

    core: Tensor
    up: Tensor
    down: Tensor
    scale: float
    name = "LoRA"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        core, up, down = (as_like(t, weight) for t in (self.core, self.up, self.down))
        product = _tucker(core, up.flatten(1).t(), down.flatten(1))
        return (product * self.scale).reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = (self.up.shape[0], self.down.shape[1] * math.prod(self.core.shape[2:]))
        return len(shape) > 1 and size == (shape[0], columns_of(shape))

    def shape(self) -> str:
        return str([self.up.shape[0], self.down.shape[1], *self.core.shape[2:]])

    def rows(self) -> int:
        return int(self.up.shape[0])

    def _rows_of(self, begin: int, end: int) -> CoreKind:
        return replace(self, up=self.up[begin:end])


@dataclass(eq=False)
class HadamardKind(Kind):
    """LoHa: scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; with cores for convolutions."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    cores: tuple[Tensor, Tensor] | None
    scale: float
    name = "LoHa"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        if self.cores is None:
            sides = [as_like(a, weight) @ as_like(b, weight) for a, b in (self.first, self.second)]
        else:
            sides = [
                _tucker(as_like(core, weight), as_like(a, weight), as_like(b, weight))
                for core, (a, b) in zip(self.cores, (self.first, self.second), strict=True)
            ]
        return (sides[0] * sides[1] * self.scale).reshape(weight.shape)

    def _size(self) -> tuple[int, int]:
        (a, b), core = self.first, self.cores
        if core is None:
            return a.shape[0], b.shape[1]
        return a.shape[1], b.shape[1] * math.prod(core[0].shape[2:])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self._size() == (shape[0], columns_of(shape))

    def shape(self) -> str:
        return str(list(self._size()))

    def rows(self) -> int:
        return self._size()[0]

    def _rows_of(self, begin: int, end: int) -> HadamardKind:
        rows = slice(begin, end)
        place = rows if self.cores is None else (slice(None), rows)
        (a, b), (c, d) = self.first, self.second
        return replace(self, first=(a[place], b), second=(c[place], d))


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """core [r, s, ...], up [r, out], down [s, in] -> [out, in, ...]."""
    return torch.einsum("ij...,ip,jr->pr...", core, up, down)


@dataclass(eq=False)
class KroneckerKind(Kind):
    """LoKr: scale * kron(left, right), each side a matrix or a product of two.

    Each row of the left side makes as many rows as the right side has. `part` (begin, end): only
    these rows of the product are used.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    core: Tensor | None  # of the right side: right[0] [r, c], right[1] [s, d]
    scale: float
    part: tuple[int, int] | None = None
    name = "LoKr"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        left = _product(self.left, weight)
        right = (
            _product(self.right, weight)
            if self.core is None
            else _tucker(as_like(self.core, weight), *(as_like(f, weight) for f in self.right))
        )
        while left.dim() < right.dim():
            left = left.unsqueeze(-1)
        product = (torch.kron(left, right) * self.scale).reshape(self._all_rows(), -1)
        begin, end = self.part or (0, self._all_rows())
        return product[begin:end].reshape(weight.shape)

    def _count(self) -> int:
        return math.prod(_product_shape(self.left)) * (
            math.prod(_product_shape(self.right))
            if self.core is None
            else self.right[0].shape[1] * self.right[1].shape[1] * math.prod(self.core.shape[2:])
        )

    def _step(self) -> int:
        """Rows of the weight that one row of the left side makes."""
        return int(self.right[0].shape[0 if self.core is None else 1])

    def _all_rows(self) -> int:
        return int(self.left[0].shape[0]) * self._step()

    def _rows_of(self, begin: int, end: int) -> KroneckerKind:
        step, first = self._step(), (self.part or (0, 0))[0]
        begin, end = begin + first, end + first
        low, high = begin // step, -(-end // step)
        left = self.left[0][low:high]
        part = begin - low * step, end - low * step
        return replace(self, left=(left, *self.left[1:]), part=part)

    def rows(self) -> int:
        begin, end = self.part or (0, self._all_rows())
        return end - begin

    def _columns(self) -> int:
        return self._count() // max(self._all_rows(), 1)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and (self.rows(), self._columns()) == (shape[0], columns_of(shape))

    def shape(self) -> str:
        return f"[{self.rows()}, {self._columns()}]"


def _product(factors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    parts = [as_like(factor, like) for factor in factors]
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def _product_shape(factors: tuple[Tensor, ...]) -> tuple[int, ...]:
    if len(factors) == 1:
        return tuple(factors[0].shape)
    return (factors[0].shape[0], *factors[1].shape[1:])


@dataclass(eq=False)
class DifferenceKind(Kind):
    """A full difference, added as it is: `diff`, `diff_b`, biases, norms."""

    value: Tensor
    scale: float = 1.0
    name = "difference"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        return (as_like(self.value, weight) * self.scale).reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.value.shape) == shape or (
            self.value.numel() == math.prod(shape) and 1 in (len(shape), self.value.dim())
        )

    def shaped(self, shape: tuple[int, ...]) -> DifferenceKind:
        """The same in the shape of its weight, where it was flattened."""
        return replace(self, value=self.value.reshape(shape)) if self.fits(shape) else self

    def shape(self) -> str:
        return str(list(self.value.shape))

    def rows(self) -> int:
        return int(self.value.shape[0])

    def _rows_of(self, begin: int, end: int) -> DifferenceKind:
        return DifferenceKind(self.value[begin:end], self.scale)


@dataclass(eq=False)
class ReplacementKind(Kind):
    """`set_weight`: at strength 1 the weight is this value, whatever it was."""

    value: Tensor
    name = "replacement"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        return as_like(self.value, weight).reshape(weight.shape) - weight

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.value.shape) == shape

    def shape(self) -> str:
        return str(list(self.value.shape))

    def _rows_of(self, begin: int, end: int) -> ReplacementKind:
        return ReplacementKind(self.value[begin:end])


@dataclass(eq=False)
class RowsKind(Kind):
    """Single rows that a weight gets: `values` [rows, columns] at `indices`, the others stay."""

    indices: Tensor
    values: Tensor
    name = "replacement of rows"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        added = torch.zeros_like(weight)
        at = self.indices.to(weight.device)
        added[at] = as_like(self.values, weight) - weight[at]
        return added

    def fits(self, shape: tuple[int, ...]) -> bool:
        count = self.indices.numel()
        if len(shape) != 2 or tuple(self.values.shape) != (count, shape[1]):
            return False
        return count == 0 or 0 <= int(self.indices.min()) <= int(self.indices.max()) < shape[0]

    def shape(self) -> str:
        return f"rows {self.indices.tolist()[:4]} and values {list(self.values.shape)}"

    def _rows_of(self, begin: int, end: int) -> RowsKind:
        within = (self.indices >= begin) & (self.indices < end)
        return RowsKind(self.indices[within] - begin, self.values[within])


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


@dataclass(eq=False)
class GloraKind(Kind):
    """GLoRA: scale * (weight @ a_in @ a_out + b_out @ b_in)."""

    a: tuple[Tensor, Tensor]  # [channels, rank], [rank, channels]
    b: tuple[Tensor, Tensor]  # [rows, rank], [rank, columns]
    scale: float
    name = "GLoRA"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        mix = as_like(self.a[0], weight) @ as_like(self.a[1], weight)  # [channels, channels]
        mixed = torch.einsum("oi...,ij->oj...", weight, mix)
        added = (as_like(self.b[0], weight) @ as_like(self.b[1], weight)).reshape(weight.shape)
        return (mixed + added) * self.scale

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = (self.b[0].shape[0], self.b[1].shape[1])
        mix = (self.a[0].shape[0], self.a[1].shape[1])
        return (
            len(shape) > 1 and size == (shape[0], columns_of(shape)) and mix == (shape[1], shape[1])
        )

    def shape(self) -> str:
        return f"[{self.b[0].shape[0]}, {self.b[1].shape[1]}]"

    def _rows_of(self, begin: int, end: int) -> GloraKind:
        return replace(self, b=(self.b[0][begin:end], self.b[1]))


@dataclass(eq=False)
class DecomposedKind(Kind):
    """DoRA: magnitude * (weight + inner) / norm(weight + inner), per output row or per column.

    `magnitude` [rows, 1] or [1, columns]; of one dimension: what its length says, rows before
    columns.
    """

    inner: Kind
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

    def shape(self) -> str:
        return self.inner.shape()

    def rows(self) -> int | None:
        return self.inner.rows()

    @property
    def cuts(self) -> int:
        shape, inner = self.magnitude.shape, self.inner
        by_column = len(shape) > 1 and shape[0] == 1 < shape[1]
        if by_column and isinstance(inner, LowRankKind):
            by_column = inner.down.shape[1] % shape[1] == 0
        by_row = self.magnitude.numel() == self.rows() and not by_column
        return inner.cuts if by_row else 0

    def _rows_of(self, begin: int, end: int) -> DecomposedKind:
        magnitude = self.magnitude.flatten()
        return DecomposedKind(self.inner.some_rows(begin, end), magnitude[begin:end])
