# SPDX-License-Identifier: Apache-2.0
"""Blocks made of a tensor of numbers and a tensor of scales, when a file is read.

ComfyUI's narrow formats keep the two apart. Here each block of a row gets its scale before its
numbers, so that a row can be moved, cut off and decoded by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distorch import _ops
from distorch.formats.stored import StoredTensor

_AT_ONCE = 16 << 20  # bytes of rows
# Scales for cuBLAS lie in tiles of 128 rows and 4 columns.
TILE_ROWS, TILE_COLUMNS = 128, 4


def _bytes(*sizes: int) -> torch.Tensor:
    """Memory on the host, whatever device the caller made the default."""
    return torch.empty(sizes, dtype=torch.uint8, device="cpu")


def tiled_shape(rows: int, blocks: int) -> tuple[int, int]:
    """The shape of the scales of a matrix of so many rows and blocks per row, in whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-blocks // TILE_COLUMNS) * TILE_COLUMNS


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the bytes of packed rows come from.

    `numbers`: rows of `blocks` blocks, as planes one after the other; `planes` are the bytes of a
    block in each. `scales`: a byte for each block, or for `shared` neighbours; `tiled` as cuBLAS
    has them. The rows may have been padded to a multiple of `row_multiple`.
    """

    numbers: StoredTensor
    scales: StoredTensor
    blocks: int
    planes: tuple[int, ...]
    shared: int = 1
    tiled: bool = False
    row_multiple: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return self.blocks * (1 + sum(self.planes))

    def is_padding(self, begin: int, end: int) -> bool:
        """Whether the fp4 or fp8 numbers of rows [begin, end) are all zero. FetchError."""
        each = self.blocks * sum(self.planes)
        numbers = _bytes((end - begin) * each)
        self.numbers.read_bytes(begin * each, numbers)
        without_signs = 0x77 if self.planes == (8,) else 0x7F
        return not bool((numbers & without_signs).any())

    def read(self, begin: int, into: torch.Tensor) -> None:
        """Fills uint8 [bytes] with the packed rows' bytes from `begin` on. FetchError."""
        row = self.row_bytes
        first, last = begin // row, -(-(begin + into.numel()) // row)
        step = max(1, _AT_ONCE // row)
        for low in range(first, last, step):
            high = min(low + step, last)
            start, end = max(low * row, begin), min(high * row, begin + into.numel())
            part = into[start - begin : end - begin]
            if part.numel() == (high - low) * row:
                self._read_rows(low, high, part.view(high - low, row))
            else:  # a row is cut
                rows = _bytes(high - low, row)
                self._read_rows(low, high, rows)
                part.copy_(rows.view(-1)[start - low * row : end - low * row])

    def _read_rows(self, begin: int, end: int, into: torch.Tensor) -> None:
        each = self.blocks * sum(self.planes)
        numbers = _bytes(end - begin, each)
        self.numbers.read_bytes(begin * each, numbers.view(-1))
        planes = torch.split(numbers, [self.blocks * width for width in self.planes], dim=1)
        scales = self._tiled(begin, end) if self.tiled else self._plain(begin, end)
        _ops.interleave(into, [scales, *(plane.contiguous() for plane in planes)])

    def _plain(self, begin: int, end: int) -> torch.Tensor:
        each = self.blocks // self.shared
        scales = _bytes(end - begin, each)
        self.scales.read_bytes(begin * each, scales.view(-1))
        return scales.repeat_interleave(self.shared, 1) if self.shared > 1 else scales

    def _tiled(self, begin: int, end: int) -> torch.Tensor:
        first, last = begin // TILE_ROWS, -(-end // TILE_ROWS)
        wide = -(-self.blocks // TILE_COLUMNS)
        # In a tile, rows r, r + 32, r + 64 and r + 96 follow each other.
        tiles = _bytes(last - first, wide, 32, 4, TILE_COLUMNS)
        tile_bytes = TILE_ROWS * TILE_COLUMNS
        self.scales.read_bytes(first * wide * tile_bytes, tiles.view(-1))
        rows = tiles.permute(0, 3, 2, 1, 4).reshape(-1, wide * TILE_COLUMNS)
        start = begin - first * TILE_ROWS
        return rows[start : start + end - begin, : self.blocks].contiguous()
