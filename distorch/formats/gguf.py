# SPDX-License-Identifier: Apache-2.0
"""Headers of GGUF files: name -> block type, shape and byte range; and the metadata.

A parser of our own: it reads each byte of the header once, believes no count before the file
has room for it, and keeps no long array. What the file says of sizes is checked against each
other and against the file.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from distorch.errors import FormatError
from distorch.formats.block_types import GGUF_TYPES
from distorch.formats.stored import StoredTensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_HEADER = 256 << 20  # bytes
_MOST_TENSORS = 1 << 17  # and as many metadata values
_MOST_ENTRIES = 2 << 20  # strings and arrays in the metadata, tokenizers included
_MOST_TEXT = 16 << 20  # bytes of one string
_MOST_NAME = 1024  # bytes of a tensor's name
_MOST_DIMENSIONS = 8
_MOST_NESTING = 4
_KEPT = 64  # entries of an array that are kept; longer ones are described
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

# Types that are what they say: no blocks.
DTYPES = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32,
    27: torch.int64, 28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
# Types of metadata values: struct formats; 8 is a string, 9 an array.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9

Value = bool | int | float | str | list["Value"]


def is_gguf(path: Path) -> bool:
    """Whether the file can be read and starts as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(
    path: Path, part: tuple[int, int] | None = None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, in file order, and its metadata in words. FormatError, OSError.

    `part`: (number from 0, count), if the file is one of several parts.
    """
    try:
        with path.open("rb") as file:
            return _Header(file, path, part).read()
    except OSError as error:
        raise FormatError(f"{str(path)!r} cannot be read: {error}") from error


class _Header:
    """One pass over the header of an open file."""

    def __init__(self, file: BinaryIO, path: Path, part: tuple[int, int] | None) -> None:
        self._file, self._path, self._part = file, path, part
        self._size = path.stat().st_size
        self._at = 0
        self._entries = 0

    def read(self) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        tensor_count, value_count = self._counts()
        metadata: dict[str, Value] = {}
        for _ in range(value_count):
            key = self._text(_MOST_TEXT)
            if key in metadata:
                raise self._damaged(f"the key {key!r} is there twice")
            metadata[key] = self._value(self._number("<I"))
        self._check_part(metadata, tensor_count)
        found: dict[str, StoredTensor] = {}
        for _ in range(tensor_count):
            tensor = self._tensor(metadata)
            if tensor.name in found:
                raise self._damaged(f"the tensor {tensor.name!r} is there twice")
            found[tensor.name] = tensor
        told = {
            key: str(value)
            for key, value in metadata.items()
            if not key.startswith(_ORIGINAL_SHAPE)
        }
        return self._placed(found, metadata), told

    def _check_part(self, metadata: dict[str, Value], tensor_count: int) -> None:
        """A split file is read by all of its parts, each in its turn."""
        count = metadata.get("split.count", 1)
        if not isinstance(count, int):
            raise self._damaged(f"its number of parts is {count!r:.80}")
        if count in (0, 1):
            if not tensor_count:
                raise self._damaged("it has no tensors")
            return
        number = metadata.get("split.no")
        if self._part is None:
            raise FormatError(
                f"{str(self._path)!r} is one of {count} parts of a split GGUF file; expected a "
                f"name that ends in -00001-of-{count:05d}.gguf, with the other parts beside it"
            )
        if self._part != (number, count):
            raise FormatError(
                f"{str(self._path)!r}: its header says part {number} of {count}, and its name says "
                f"part {self._part[0]} of {self._part[1]}; give it its first name again"
            )

    # --- pieces of the header ---

    def _counts(self) -> tuple[int, int]:
        magic = self._bytes(4)
        if magic != MAGIC:
            raise FormatError(f"{str(self._path)!r} is not a GGUF file: it starts with {magic!r}")
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise FormatError(
                f"{str(self._path)!r} is a big-endian GGUF file; only little-endian ones are read"
            )
        if version not in _VERSIONS:
            raise FormatError(
                f"{str(self._path)!r} is GGUF version {version}; this version reads 2 and 3"
            )
        tensors, values = self._number("<Q"), self._number("<Q")
        if max(tensors, values) > _MOST_TENSORS:
            raise self._damaged(f"{tensors} tensors and {values} metadata values")
        # name, dimensions, type, offset: 24 bytes at least; key, type, value: 13.
        self._room(tensors * 24 + values * 13, f"{tensors} tensors and {values} metadata values")
        return tensors, values

    def _value(self, kind: int, depth: int = 0) -> Value:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text(_MOST_TEXT)
        if kind != _ARRAY:
            raise self._damaged(f"metadata of an unknown type, {kind}")
        if depth == _MOST_NESTING:
            raise self._damaged(f"arrays more than {_MOST_NESTING} deep")
        return self._array(depth)

    def _array(self, depth: int) -> Value:
        kind, count = self._number("<I"), self._number("<Q")
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            self._room(count * width, f"an array of {count}")
            if count > _KEPT:
                self._skip(count * width)
                return f"[{count} numbers]"
            return [self._number(_SCALARS[kind]) for _ in range(count)]
        self._room(count * (8 if kind == _TEXT else 12), f"an array of {count}")
        self._entries += count
        if self._entries > _MOST_ENTRIES:
            raise self._damaged(f"more than {_MOST_ENTRIES} strings in its metadata")
        values = []
        for i in range(count):
            value = self._value(kind, depth + 1)
            if i < _KEPT:
                values.append(value)
        return values if count <= _KEPT else f"[{count} entries]"

    def _tensor(self, metadata: dict[str, Value]) -> StoredTensor:
        name = self._text(_MOST_NAME)
        count = self._number("<I")
        if count > _MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {count} dimensions")
        # The fastest dimension comes first.
        shape = tuple(reversed([self._number("<Q") for _ in range(count)]))
        kind, offset = self._number("<I"), self._number("<Q")
        dtype, block_type, nbytes = self._layout(name, shape, kind)
        original = metadata.get(_ORIGINAL_SHAPE + name)
        if original is not None:
            shape = self._original_shape(name, shape, original)
        return StoredTensor(
            name, str(self._path), offset, nbytes, dtype, shape, block_type=block_type
        )

    def _layout(
        self, name: str, shape: tuple[int, ...], kind: int
    ) -> tuple[torch.dtype, str | None, int]:
        """dtype, block type and bytes of a tensor."""
        elements = prod(shape)
        if not 0 < elements < 1 << 63:
            raise self._damaged(f"tensor {name!r} has the shape {shape}")
        if kind in DTYPES:
            return DTYPES[kind], None, elements * DTYPES[kind].itemsize
        if kind not in GGUF_TYPES:
            known = ", ".join(block[0] for block in GGUF_TYPES.values())
            raise FormatError(
                f"tensor {name!r} in {str(self._path)!r} has the GGUF type {kind}, which this "
                f"version does not decode; it decodes {known}, F16, BF16, F32"
            )
        block_type, block_elements, block_bytes = GGUF_TYPES[kind]
        if not shape or shape[-1] % block_elements:
            raise self._damaged(f"tensor {name!r} ({block_type}) has the shape {shape}")
        return torch.uint8, block_type, elements // block_elements * block_bytes

    def _original_shape(self, name: str, shape: tuple[int, ...], value: Value) -> tuple[int, ...]:
        """The shape before a converter made it fit GGUF: conv weights, 5-D weights."""
        sizes = value if isinstance(value, list) else []
        whole = [size for size in sizes if isinstance(size, int) and size > 0]
        if not whole or len(whole) != len(sizes) or prod(whole) != prod(shape):
            raise self._damaged(f"tensor {name!r} of shape {shape} is said to have been {value}")
        return tuple(whole)

    def _placed(
        self, found: dict[str, StoredTensor], metadata: dict[str, Value]
    ) -> dict[str, StoredTensor]:
        """The tensors with offsets in the file, in its order; none beyond it, none in another."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        end, placed = start, {}
        for tensor in sorted(found.values(), key=lambda tensor: tensor.offset):
            begin = start + tensor.offset
            if tensor.offset % alignment:
                raise self._damaged(f"tensor {tensor.name!r} is not aligned to {alignment} bytes")
            if begin < end:
                raise self._damaged(f"tensor {tensor.name!r} lies inside another")
            end = begin + tensor.nbytes
            if end > self._size:
                raise self._damaged(
                    f"tensor {tensor.name!r} ends at byte {end}, the file at {self._size}"
                )
            placed[tensor.name] = replace(tensor, offset=begin)
        return placed

    # --- bytes ---

    def _damaged(self, what: str) -> FormatError:
        return FormatError(
            f"{str(self._path)!r} is a damaged GGUF file: {what}; "
            "if it was downloaded, compare its size and download it again"
        )

    def _room(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            raise self._damaged(f"no room for {what}")
        if self._at + count > _MOST_HEADER:
            raise self._damaged(f"a header of more than {_MOST_HEADER} bytes")

    def _skip(self, count: int) -> None:
        self._room(count, f"{count} bytes")
        self._at += count
        self._file.seek(self._at)

    def _bytes(self, count: int) -> bytes:
        self._room(count, f"{count} bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise self._damaged(f"it ends at byte {self._at + len(data)}")
        self._at += count
        return data

    def _number(self, layout: str) -> int:
        # Floats too; those callers ask for whole numbers only by their format.
        (number,) = struct.unpack(layout, self._bytes(struct.calcsize(layout)))
        return number  # type: ignore[no-any-return]

    def _text(self, most: int) -> str:
        length = self._number("<Q")
        if length > most:
            raise self._damaged(f"a string of {length} bytes")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a string that is not UTF-8 ({error})") from error
