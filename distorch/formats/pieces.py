"""Tensors that a file keeps in several places: byte ranges, put together when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from distorch.formats.safetensors import StoredTensor

# Pieces that lie close together are read at once: a permuted matrix would be a read per row.
_SPAN = 16 << 20  # bytes


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
