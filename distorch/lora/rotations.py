# SPDX-License-Identifier: Apache-2.0
"""Patches that turn a weight instead of adding to it: OFT and BOFT, of rows and of columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distorch.lora.kinds import Kind, as_like, columns_of


def _skew(vectors: Tensor, size: int) -> Tensor:
    """[blocks, size * (size - 1) / 2] -> skew-symmetric [blocks, size, size]."""
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(vectors.shape[0], size, size)
    upper[:, rows, columns] = vectors
    return upper - upper.transpose(-2, -1)


def _cayley(skew: Tensor) -> Tensor:
    """(I - Q)^-1 applied from the right to (I + Q): a rotation of each block."""
    one = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    rotated: Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
    return rotated


@dataclass(eq=False)
class RotationKind(Kind):
    """OFT and BOFT as LyCORIS writes them: blocks of output rows are rotated.

    `blocks` [blocks, size, size] (OFT) or [stages, blocks, size, size] (BOFT); `rescale` per row;
    a `constraint` above 0, times the rows, bounds the norm of what is rotated by.
    """

    blocks: Tensor
    rescale: Tensor | None
    constraint: float
    name = "OFT"

    def delta(self, weight: Tensor) -> Tensor:
        raw = as_like(self.blocks, weight)
        skew = raw - raw.transpose(-2, -1)
        if self.constraint > 0:
            norm, bound = torch.linalg.vector_norm(skew) + 1e-8, self.constraint * self.rows()
            skew = skew * (bound / norm).clamp(max=1)
        rotation = _cayley(skew)
        flat = weight.flatten(1)
        if rotation.dim() == 3:
            parts = flat.view(rotation.shape[0], -1, flat.shape[1])
            result = torch.einsum("knm,kn...->km...", rotation, parts).reshape(flat.shape)
        else:
            result = _butterfly(rotation, flat)
        if self.rescale is not None:
            result = result * as_like(self.rescale, weight).reshape(-1, 1)
        return (result - flat).reshape(weight.shape)

    def rows(self) -> int:
        return int(self.blocks.shape[-3] * self.blocks.shape[-1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self.rows() == shape[0]

    def shape(self) -> str:
        return f"{self.rows()} rows"


def _butterfly(rotation: Tensor, flat: Tensor) -> Tensor:
    """Stage i rotates rows that lie 2^i half blocks apart."""
    size = rotation.shape[-1]
    for stage, turn in enumerate(rotation):
        apart = 2**stage * (size // 2)
        gathered = flat.reshape(-1, 2, apart, flat.shape[1]).transpose(1, 2).flatten(0, 2)
        turned = torch.einsum("bij,bj...->bi...", turn, gathered.view(-1, size, flat.shape[1]))
        flat = turned.reshape(-1, apart, 2, flat.shape[1]).transpose(1, 2).flatten(0, 2)
    return flat


@dataclass(eq=False)
class InputRotationKind(Kind):
    """OFT as PEFT writes it: `vectors` [blocks, size * (size - 1) / 2] rotate blocks of columns.

    `terms` of the Neumann series that stands for the inverse, as in PEFT; 0: the inverse itself.
    """

    vectors: Tensor
    terms: int
    name = "OFT"
    cuts = 1

    def _block(self) -> int:
        return int(1 + math.isqrt(1 + 8 * self.vectors.shape[1])) // 2

    def delta(self, weight: Tensor) -> Tensor:
        size = self._block()
        skew = _skew(as_like(self.vectors, weight), size)
        rotation = _cayley(-skew) if self.terms == 0 else _neumann(skew, self.terms)
        flat = weight.flatten(1)
        blocks = flat.shape[1] // size
        rotation = rotation.expand(blocks, size, size)
        turned = torch.einsum("rbj,bij->rbi", flat.reshape(-1, blocks, size), rotation)
        return (turned.flatten(1) - flat).reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = self._block()
        if len(shape) < 2 or size < 1 or columns_of(shape) % size:
            return False
        if self.vectors.shape[1] != size * (size - 1) // 2:  # no triangle
            return False
        return self.vectors.shape[0] in (1, columns_of(shape) // size)

    def shape(self) -> str:
        return f"{self.vectors.shape[0]} blocks of {self._block()} columns"

    def _rows_of(self, begin: int, end: int) -> InputRotationKind:
        return self  # the same for every row


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """1 + 2 Q + 2 Q^2 + ... + Q^(terms - 1): the first terms of (1 + Q)(1 - Q)^-1."""
    result = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).repeat(
        skew.shape[0], 1, 1
    )
    if terms > 1:
        result = result + 2 * skew
    if terms > 2:
        power = skew @ skew
        result = result + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            result = result + 2 * power
        result = result + power @ skew
    return result


@dataclass(eq=False)
class InputButterflyKind(Kind):
    """BOFT as PEFT writes it: `rotations` [stages, blocks, size, size], `scales` per output row."""

    rotations: Tensor
    scales: Tensor
    name = "BOFT"
    cuts = 1

    def delta(self, weight: Tensor) -> Tensor:
        raw = as_like(self.rotations, weight)
        turned = _cayley(0.5 * (raw - raw.transpose(-2, -1)).neg())
        flat = weight.flatten(1)
        result = flat.t()
        for stage, blocks in enumerate(turned):
            order = self._order(stage, flat.shape[1]).to(flat.device)
            back = torch.empty_like(order)
            back[order] = torch.arange(order.numel(), device=order.device)
            inner = result[back].view(blocks.shape[0], -1, flat.shape[0])
            result = torch.einsum("bij,bj...->bi...", blocks, inner).flatten(0, 1)[order]
        result = result.t() * as_like(self.scales, weight).reshape(-1, 1)
        return (result - flat).reshape(weight.shape)

    def _order(self, stage: int, columns: int) -> Tensor:
        stages, blocks, size, _ = self.rotations.shape
        order = torch.arange(columns)
        if stages == 1:
            return order
        half, length = size // 2, columns // (blocks // 2**stage)
        groups = torch.arange(length).view(-1, half)
        inner = torch.cat((groups[0::2], groups[1::2])).flatten()
        return order.view(-1, length)[:, inner].flatten()

    def fits(self, shape: tuple[int, ...]) -> bool:
        columns = self.rotations.shape[1] * self.rotations.shape[2]
        return len(shape) > 1 and columns_of(shape) == columns and self.scales.numel() == shape[0]

    def shape(self) -> str:
        return f"[{self.scales.numel()}, {self.rotations.shape[1] * self.rotations.shape[2]}]"

    def _rows_of(self, begin: int, end: int) -> InputButterflyKind:
        return replace(self, scales=self.scales.flatten()[begin:end])
