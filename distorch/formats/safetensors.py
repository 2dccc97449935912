# SPDX-License-Identifier: Apache-2.0
"""Headers of safetensors files: name -> dtype, shape and byte range."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distorch.errors import FormatError
from distorch.formats.stored import StoredTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

_SMALLEST = 8  # bytes: the length of the header


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, in file order, and its metadata. FormatError when it is damaged.

    The safetensors library judges the file first: what it refuses is refused here.
    """
    try:
        if path.stat().st_size < _SMALLEST:  # as files in /proc say, some of which never end
            raise ValueError("it is too short for a header")
        # For torch it would map the file to write to, which fails if that is larger than the RAM.
        with safe_open(path, framework="numpy"):
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
    if prod(size for size in shape if size) >= 1 << 63:  # with a 0 it has no bytes
        raise FormatError(f"tensor {name!r} in {str(path)!r}: no memory has the shape {shape}")
    if end - begin != prod(shape) * dtype.itemsize:
        raise FormatError(
            f"tensor {name!r} in {str(path)!r}: {end - begin} bytes do not make the shape {shape}; "
            "download the file again"
        )
    return StoredTensor(name, str(path), start + begin, end - begin, dtype, shape)
