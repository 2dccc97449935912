# SPDX-License-Identifier: Apache-2.0
"""Patches that are made of factors: LoRA, LoHa, LoKr, GLoRA.

Plain products of two factors are terms of the merge kernel as they are. All others give their
`delta`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distorch import _ops
from distorch.lora.kinds import Kind, as_like, columns_of


@dataclass(eq=False)
class ProductKind(Kind):
    """scale * up @ down, which the merge kernel adds: a matrix, or a stack of matrices.

    `up` [.., rows, rank], `down` [.., rank, columns], given in any floating dtype.
    """

    up: Tensor
    down: Tensor
    scale: float
    name = "LoRA"
    cuts = 1

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both in float32, contiguous. The scale is not in them: it goes with the strength, which
        the kernel multiplies by.
        """
        return _in_float32(self.up), _in_float32(self.down)

    def keep_factors(self) -> None:
        """Makes both float32 for good: they are asked for again and again."""
        self.up, self.down = self.factors()

    def pieces(self, first_row: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Factors as the kernel takes them, and the row of its matrix that each begins at. That
        matrix has as many columns as `down`. `first_row`: where the patch begins in the weight.
        """
        yield *self.factors(), first_row


@dataclass(eq=False)
class LowRankKind(ProductKind):
    """scale * up @ down; `up` [rows, rank], `down` [rank, columns]."""

    def __post_init__(self) -> None:
        self.up, self.down = (_flat(factor) for factor in (self.up, self.down))

    def delta(self, weight: Tensor) -> Tensor:
        product = (as_like(self.up, weight) @ as_like(self.down, weight)) * self.scale
        return product.reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and (self.up.shape[0], self.down.shape[1]) == (
            shape[0],
            columns_of(shape),
        )

    def columns(self) -> int:
        return int(self.down.shape[1])

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


@dataclass(eq=False)
class StackedKind(ProductKind):
    """scale * up[i] @ down[i] on the i-th matrix of a stack, such as a layer's experts.

    `up` [matrices, rows, rank], `down` [matrices, rank, columns]. Matrices of the weight have
    `height` rows; the products are for those from row `begin` on.
    """

    height: int
    begin: int = 0
    _views: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    def keep_factors(self) -> None:
        super().keep_factors()
        if not self._views:
            self._views = list(zip(self.up, self.down, strict=True))

    def pieces(self, first_row: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        ups, downs = self.factors()
        if ups.shape[1] == self.height:  # one after the other, without a gap
            yield ups, downs, first_row * self.height
            return
        # The same objects each time: what a device has of them is found by that.
        for i, (up, down) in enumerate(self._views or zip(ups, downs, strict=True)):
            yield up, down, (first_row + i) * self.height + self.begin

    def delta(self, weight: Tensor) -> Tensor:
        added = torch.zeros_like(weight)
        product = as_like(self.up, weight) @ as_like(self.down, weight)
        added[:, self.inner_rows.start : self.inner_rows.stop] = product * self.scale
        return added

    @property
    def inner_rows(self) -> range:
        """The rows of every matrix that it changes."""
        return range(self.begin, self.begin + int(self.up.shape[1]))

    def fits(self, shape: tuple[int, ...]) -> bool:
        whole = (self.up.shape[0], self.height, self.down.shape[2])
        return shape == whole and self.begin >= 0 and self.inner_rows.stop <= self.height

    def shape(self) -> str:
        matrices, rows, rank = self.up.shape
        return f"[{matrices}, {rows}, {self.down.shape[2]}] of rank {rank}"

    def rows(self) -> int:
        return int(self.up.shape[0])

    def _rows_of(self, begin: int, end: int) -> StackedKind:
        return replace(self, up=self.up[begin:end], down=self.down[begin:end])


def _flat(factor: Tensor) -> Tensor:
    """A factor as a matrix, in float32 if it was wider."""
    matrix = factor.detach().flatten(1)
    return matrix.float() if matrix.dtype.itemsize > 4 else matrix


def _in_float32(factor: Tensor) -> Tensor:
    if factor.dtype not in (torch.float16, torch.bfloat16) or factor.device.type != "cpu":
        return factor.float().contiguous()
    # Not by an operator of torch, whose threads would go on spinning, on cores that merges want.
    into = torch.empty(factor.shape, dtype=torch.float32)
    matrix = into.view(-1, max(factor.shape[-1], 1))
    _ops.decode(matrix, factor.contiguous(), _ops.code_of(factor.dtype))
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
