# SPDX-License-Identifier: Apache-2.0
"""What a patch adds to a weight: what every kind of patch can do, and the kinds that say it whole.

Every kind has `delta(weight)`: what it adds at strength 1 to a weight that is given in the dtype of
the arithmetic (float64 where the device has it), same shape.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor

from distorch.errors import FormatError


def as_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A factor on the device and in the dtype of `like`."""
    return tensor.detach().to(like.device, like.dtype)


class Kind:
    """One LoRA's part for one weight (or for some rows of it)."""

    name = "patch"
    replaces = False  # whether it puts values in place of what is there

    def delta(self, weight: Tensor) -> Tensor:
        """What strength 1 adds to `weight` (float32 or float64), same shape."""
        raise NotImplementedError

    def put(self, into: Tensor) -> None:
        """Replaces a weight, or the part of it that this is for, if it `replaces`."""
        raise NotImplementedError

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of that shape."""
        raise NotImplementedError

    def shape(self) -> str:
        """The shape that it was made for, in words."""
        raise NotImplementedError

    def rows(self) -> int | None:
        """Rows that it covers, where that is known without the weight."""
        return None

    def columns(self) -> int | None:
        """Columns that it covers, where that is known without the weight."""
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


def shapes_in(value: object) -> Hashable:
    """What tells a kind from another one, but for the numbers in its tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return tuple(map(shapes_in, value))
    if isinstance(value, Kind) and is_dataclass(value):
        return type(value), *(shapes_in(getattr(value, field.name)) for field in fields(value))
    return value if isinstance(value, Hashable) else id(value)


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
        return int(self.value.shape[0]) if self.value.dim() else 1

    def _rows_of(self, begin: int, end: int) -> DifferenceKind:
        return DifferenceKind(self.value[begin:end], self.scale)


@dataclass(eq=False)
class ReplacementKind(Kind):
    """`set_weight`: the weight is this value, whatever it was, at any strength but 0."""

    value: Tensor
    name = "replacement"
    replaces = True
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        return as_like(self.value, weight).reshape(weight.shape) - weight

    def put(self, into: Tensor) -> None:
        into.copy_(as_like(self.value, into).reshape(into.shape))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.value.shape) == shape

    def shape(self) -> str:
        return str(list(self.value.shape))

    def _rows_of(self, begin: int, end: int) -> ReplacementKind:
        return ReplacementKind(self.value[begin:end])


@dataclass(eq=False)
class RowsKind(Kind):
    """Single rows that a weight gets at any strength but 0: `values` [rows, columns] at `indices`.
    The others stay.
    """

    indices: Tensor
    values: Tensor
    name = "replacement of rows"
    replaces = True
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        added = torch.zeros_like(weight)
        at = self.indices.to(weight.device)
        added[at] = as_like(self.values, weight) - weight[at]
        return added

    def put(self, into: Tensor) -> None:
        into[self.indices.to(into.device)] = as_like(self.values, into)

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
