# SPDX-License-Identifier: Apache-2.0
"""Tensors in files: where the bytes are, and how they are read.

Every reader of a file format makes `StoredTensor`s. Whoever loads or patches weights works with
these alone, whatever the format was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from distorch import _ops

_PAGE = 4096  # bytes
_COMPARED = 32 << 20  # bytes of each, at one time
# Pieces that lie close together are read at once: a permuted matrix would be a read per row.
_SPAN = 16 << 20  # bytes


@dataclass(frozen=True)
class Declared:
    """What a file says of a tensor's numbers: `told`, its words.

    `table` are numbers that all blocks share, `rotation` how many columns were turned together (0:
    none). `scale` is the key beside the layer that the numbers need, if any. `refusal` says why
    this version does not read them, where it does not.
    """

    told: Mapping[str, Any] = field(compare=False)
    table: tuple[float, ...] = ()
    rotation: int = 0
    scale: str = ""
    refusal: str = ""


class PackedRows(Protocol):
    """Rows of blocks that are put together when they are read: `packing.Packing`."""

    @property
    def row_multiple(self) -> int:
        """The number of rows was padded to a multiple of this. 1: it was not."""

    def is_padding(self, begin: int, end: int) -> bool:
        """Whether the numbers of rows [begin, end) are all zero. FetchError."""

    def read(self, begin: int, into: torch.Tensor) -> None:
        """Fills uint8 [bytes] with the rows' bytes from `begin` on. FetchError."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape` in elements, `offset` and `nbytes` in bytes.

    `strides`: it is a strided view of the bytes from `offset` on; in elements. `pieces` say what it
    is put together from where it is several ranges, and `path` and `offset` are then those of the
    first. `data` holds it, in memory, where it is neither.
    With a `block_type` the bytes are quantised blocks of the elements in order, and `dtype` is
    uint8. A shape's last dimension need not be whole blocks; all elements together are. A
    tensor of a type that this version does not read is kept in the same way, with the type's own
    name as `block_type`; `block_types.check_readable` refuses it. With a `packing` the blocks are
    put together from two other tensors. `declared`: what the file says of the format of its
    numbers (see `quantisation`).
    """

    name: str
    path: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: torch.Tensor | None = None
    block_type: str | None = None
    pieces: tuple[Piece, ...] = ()
    packing: PackedRows | None = None
    declared: Declared | None = field(default=None, compare=False)
    strides: tuple[int, ...] | None = None

    @property
    def in_one_range(self) -> bool:
        """Whether `offset` and `nbytes` say all: the file itself can be its donor."""
        whole = self.data is None and self.strides is None
        return whole and not self.pieces and self.packing is None

    @property
    def span(self) -> tuple[int, int]:
        """Where the bytes that it is made of begin and end in the file. REQUIRES: it has no `data`,
        no pieces and no packing.
        """
        if self.strides is None:
            return self.offset, self.offset + self.nbytes
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.offset, self.offset + (last + 1) * self.dtype.itemsize

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Its values, contiguous, in new memory or in `into` (uint8, `room` bytes); of blocks, the
        bytes [nbytes]. FormatError, FetchError.
        """
        shape = (self.nbytes,) if self.block_type else self.shape
        if into is None and self.in_one_range and self.nbytes:
            return _ops.read_tensor(self.path, self.offset, shape, self.dtype)
        if into is None:
            target = _ops.host_tensor(shape, self.dtype)
        else:
            start = self._start_in(into)
            target = into[start : start + self.nbytes].view(self.dtype).view(shape)
        if self.packing is not None:
            self.packing.read(0, target)
        elif self.data is not None:
            target.copy_(self.data.detach())
        elif self.strides is not None:
            begin, end = self.span
            room = _ops.host_tensor(((end - begin) // self.dtype.itemsize,), self.dtype)
            _ops.read_file(self.path, begin, room)
            target.copy_(room.as_strided(self.shape, self.strides))
        elif self.pieces:
            read_pieces(self.pieces, target.view(-1).view(torch.uint8))
        elif self.nbytes:
            _ops.read_file(self.path, self.offset, target)
        return target

    def read_bytes(self, begin: int, into: torch.Tensor) -> None:
        """Fills uint8 [bytes] with its bytes from `begin` on. REQUIRES: it has no pieces itself.
        FormatError, FetchError.
        """
        if self.packing is not None:
            self.packing.read(begin, into)
        elif self.data is not None or self.strides is not None:
            flat = self.read().reshape(-1).view(torch.uint8)
            into.copy_(flat[begin : begin + into.numel()])
        elif into.numel():
            _ops.read_file(self.path, self.offset + begin, into)

    @property
    def room(self) -> int:
        """Bytes of a buffer into which it can be read without a copy on the way."""
        return self.nbytes + _PAGE

    def _start_in(self, buffer: torch.Tensor) -> int:
        """Where in a buffer its bytes lie as in the file, modulo a page."""
        start = (self.offset - buffer.data_ptr()) % _PAGE if self.in_one_range else 0
        return start if start % self.dtype.itemsize == 0 else 0


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bytes. FetchError."""
    if (one.dtype, one.block_type, one.shape) != (other.dtype, other.block_type, other.shape):
        return False
    if one.in_one_range and other.in_one_range:
        if (one.path, one.offset) == (other.path, other.offset):
            return True
        for begin in range(0, one.nbytes, _COMPARED):
            end = min(begin + _COMPARED, one.nbytes)
            parts = [torch.empty(end - begin, dtype=torch.uint8) for _ in range(2)]
            for tensor, into in zip((one, other), parts, strict=True):
                _ops.read_file(tensor.path, tensor.offset + begin, into)
            if not torch.equal(*parts):
                return False
        return True
    ours, theirs = (tensor.read().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(ours, theirs)


class Piece(NamedTuple):
    """`nbytes` bytes of a stored tensor, from its byte `begin` on."""

    source: StoredTensor
    begin: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


def read_pieces(pieces: Sequence[Piece], into: torch.Tensor) -> None:
    """Fills uint8 [bytes] with the pieces, in order. Takes up to 16 MiB more while it does, twice
    that for packed tensors.

    Raises FormatError, FetchError.
    """
    at = 0
    for near in _near_ones(pieces):
        begin = min(piece.begin for piece in near)
        end = max(piece.end for piece in near)
        total = sum(piece.nbytes for piece in near)
        if len(near) == 1:
            near[0].source.read_bytes(begin, into[at : at + total])
            at += total
            continue
        span = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        near[0].source.read_bytes(begin, span)
        for piece in near:
            into[at : at + piece.nbytes] = span[piece.begin - begin : piece.end - begin]
            at += piece.nbytes


def _near_ones(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in order, in groups that are worth one read each."""
    group: list[Piece] = []
    begin = end = 0
    for piece in pieces:
        wider = min(begin, piece.begin), max(end, piece.end)
        if group and (piece.source is not group[0].source or wider[1] - wider[0] > _SPAN):
            yield group
            group = []
        begin, end = wider if group else (piece.begin, piece.end)
        group.append(piece)
    if group:
        yield group
