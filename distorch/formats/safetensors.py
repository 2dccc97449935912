"""Headers of safetensors files: name -> dtype, shape and byte range."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distorch import _ops
from distorch.errors import FormatError
from distorch.formats.packing import Packing
from distorch.formats.pieces import Piece, read_pieces

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

_PAGE = 4096  # bytes
_COMPARED = 32 << 20  # bytes of each, at one time


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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape` in elements, `offset` and `nbytes` in bytes.

    `data` holds it (mapped, not read) where the file does not keep it in one contiguous range;
    `pieces` say what it is put together from where it is several ranges, and `path` and `offset`
    are then those of the first.
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
    packing: Packing | None = None
    declared: Declared | None = field(default=None, compare=False)

    @property
    def in_one_range(self) -> bool:
        """Whether `offset` and `nbytes` say all: the file itself can be its donor."""
        return self.data is None and not self.pieces and self.packing is None

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
        elif self.data is not None:
            flat = self.data.detach().reshape(-1).view(torch.uint8)
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


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, in file order, and its metadata. FormatError when it is damaged.

    The safetensors library judges the file first: what it refuses is refused here.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise FormatError(
            f"{str(path)!r} is not a safetensors file that can be read ({error}); "
            "if it was downloaded, compare its size and download it again"
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    tensors = {name: _stored(name, entry, start, path) for name, entry in header.items()}
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset)), metadata


def _stored(name: str, entry: dict[str, Any], start: int, path: Path) -> StoredTensor:
    dtype = DTYPES.get(entry["dtype"])
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if dtype is None:  # refused where somebody wants it
        known = start + begin, end - begin, torch.uint8, shape
        return StoredTensor(name, str(path), *known, block_type=str(entry["dtype"]))
    if end - begin != prod(shape) * dtype.itemsize:
        raise FormatError(
            f"tensor {name!r} in {str(path)!r}: {end - begin} bytes do not make the shape {shape}; "
            "download the file again"
        )
    return StoredTensor(name, str(path), start + begin, end - begin, dtype, shape)
