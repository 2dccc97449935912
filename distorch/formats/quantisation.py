# SPDX-License-Identifier: Apache-2.0
"""What a file says of its numbers: ComfyUI's `comfy_quant`, beside a weight or in the header.

A declaration names a format and what belongs to it. It is never passed over: the same bytes mean
other numbers under another format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distorch._small_files import parse_json
from distorch.errors import FormatError
from distorch.formats.block_types import PACKED_TYPES
from distorch.formats.packing import Packing, tiled_shape
from distorch.formats.plain_names import match_names
from distorch.formats.stored import Declared, Piece, StoredTensor

BESIDE = ".comfy_quant"
HEADER_KEY = "_quantization_metadata"

# Keys that change nothing of the numbers, or say what the shapes show.
_HARMLESS = frozenset({
    "format", "params", "full_precision_matrix_mult", "num_experts", "linear_dtype", "per_row",
    "orig_dtype",
})  # fmt: skip
_ROTATION, _ROTATION_SIZE = "convrot", "convrot_groupsize"
_MOST_TOLD = 1 << 20  # bytes of one declaration
_MOST_ROTATION = 4096  # columns, as in csrc/core/rotation.h


@dataclass
class _Layer:
    """One declared weight, and what lies beside it: what has been `taken` is part of the weight."""

    weight: StoredTensor
    told: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    taken: list[str]

    def refusal(self, what: str) -> FormatError:
        return FormatError(
            f"{self.weight.name!r} is stored in the format {self.told.get('format')!r} "
            f"(comfy_quant), {what}"
        )

    def check_dtype(self, dtype: torch.dtype) -> None:
        if self.weight.dtype != dtype:
            raise self.refusal(f"and its numbers are {self.weight.dtype}; expected {dtype}")

    def check_is(self, key: str, wanted: int) -> None:
        """Refuses a key that says something else than the one value that the format has."""
        if self.told.get(key, wanted) != wanted:
            raise self.refusal(f"with {key}={self.told[key]!r:.60}; expected {wanted}")

    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored numbers."""
        if len(self.weight.shape) != 2 or 0 in self.weight.shape:
            raise self.refusal(f"and has the shape {self.weight.shape}; expected a matrix")
        return self.weight.shape[0], self.weight.shape[1]

    def key(self, suffix: str) -> str:
        return f"{self.weight.name.removesuffix('.weight')}.{suffix}"

    def beside(self, suffix: str, shape: Sequence[int], *dtypes: torch.dtype) -> StoredTensor:
        """A tensor that the format keeps beside the weight, of that shape and one of the dtypes."""
        key = self.key(suffix)
        found = self.tensors.get(key)
        if found is None:
            raise self.refusal(f"and the file has no {key!r}")
        if found.block_type is not None or found.dtype not in dtypes:
            raise self.refusal(
                f"and {key!r} has the dtype {found.block_type or found.dtype}; expected {dtypes[0]}"
            )
        if found.shape != tuple(shape):
            raise self.refusal(f"and {key!r} has the shape {found.shape}; expected {tuple(shape)}")
        self.taken.append(key)
        return found

    def rotation(self, columns: int) -> int:
        """Columns that were turned together."""
        turned = self.told.get(_ROTATION, True)
        if not isinstance(turned, bool | int) or not turned:
            raise self.refusal(f"with {_ROTATION}={turned!r:.60}, which it cannot have")
        group = self.told.get(_ROTATION_SIZE, 256)
        if not isinstance(group, int) or not _is_power_of_four(group) or columns % group:
            raise self.refusal(
                f"with {_ROTATION_SIZE}={group!r:.60}; expected a power of 4, at most "
                f"{_MOST_ROTATION}, that divides its {columns} columns"
            )
        return group

    def packed(
        self, block_type: str, rows: int, columns: int, packing: Packing | None = None
    ) -> StoredTensor:
        """The weight as blocks, [rows, columns] of numbers."""
        elements, nbytes = PACKED_TYPES[block_type]
        data = None if packing is not None else self.weight.data
        if data is not None:
            data = data.detach().contiguous().view(torch.uint8).reshape(-1)
        in_order = packing is not None or self.weight.strides is None
        pieces = () if in_order else (Piece(self.weight, 0, self.weight.nbytes),)
        return replace(
            self.weight, dtype=torch.uint8, shape=(rows, columns), block_type=block_type,
            nbytes=rows * columns // elements * nbytes, data=data, packing=packing, pieces=pieces,
            strides=None,
        )  # fmt: skip


def _is_power_of_four(group: int) -> bool:
    return 4 <= group <= _MOST_ROTATION and group.bit_count() == 1 and group.bit_length() % 2 == 1


# --- formats: each gives the tensor as it is read, and what its numbers need ---

_Read = Callable[[_Layer], StoredTensor]


def _scaled(dtype: torch.dtype) -> _Read:
    def read(layer: _Layer) -> StoredTensor:
        layer.check_dtype(dtype)
        return replace(layer.weight, declared=Declared(layer.told, scale="weight_scale"))

    return read


def _int8(layer: _Layer) -> StoredTensor:
    layer.check_dtype(torch.int8)
    rotation = 0
    if layer.told.get(_ROTATION):
        rotation = layer.rotation(layer.matrix()[1])
    declared = Declared(layer.told, rotation=rotation, scale="weight_scale")
    return replace(layer.weight, declared=declared)


def _int4(layer: _Layer) -> StoredTensor:
    layer.check_dtype(torch.int8)
    layer.check_is("quant_group_size", 64)
    if layer.told.get("linear_dtype", "int4") not in ("int4", "int8"):
        raise layer.refusal(
            f"with linear_dtype={layer.told['linear_dtype']!r:.60}; expected 'int4' or 'int8'"
        )
    rows, half = layer.matrix()
    rotation = layer.rotation(2 * half)
    _check_columns(layer, 2 * half, 64)
    packed = layer.packed("I4x16", rows, 2 * half)
    return replace(packed, declared=Declared(layer.told, rotation=rotation, scale="weight_scale"))


def _nvfp4(layer: _Layer) -> StoredTensor:
    layer.check_dtype(torch.uint8)
    layer.check_is("group_size", 16)
    rows, half = layer.matrix()
    columns = 2 * half
    _check_columns(layer, columns, 16)
    blocks = columns // 16
    scales = layer.beside(
        "weight_scale", tiled_shape(rows, blocks), torch.float8_e4m3fn, torch.uint8
    )
    one = layer.tensors.get(layer.key("weight_scale_2"))
    shape = () if one is None or one.shape != (1,) else (1,)
    factor = layer.beside("weight_scale_2", shape, torch.float32)
    packing = Packing(layer.weight, scales, blocks, (8,), tiled=True, row_multiple=16)
    packed = layer.packed("FP4x16", rows, columns, packing)
    return replace(packed, declared=Declared(layer.told, table=(float(factor.read()),)))


def _mxfp8(layer: _Layer) -> StoredTensor:
    layer.check_dtype(torch.float8_e4m3fn)
    layer.check_is("group_size", 32)
    rows, columns = layer.matrix()
    _check_columns(layer, columns, 32)
    blocks = columns // 32
    scales = layer.beside(
        "weight_scale", tiled_shape(rows, blocks), torch.uint8, torch.float8_e8m0fnu
    )
    packing = Packing(layer.weight, scales, blocks, (32,), tiled=True, row_multiple=32)
    packed = layer.packed("FP8x32", rows, columns, packing)
    return replace(packed, declared=Declared(layer.told))


def _w4a8(layer: _Layer) -> StoredTensor:
    layer.check_dtype(torch.int8)
    rows, width = layer.matrix()
    group = layer.told.get("group_size", 16)
    if not isinstance(group, int) or not 16 <= group <= 2 * width or group % 16:
        raise layer.refusal(
            f"with group_size={group!r:.60}; expected a multiple of 16, at most its columns"
        )
    if layer.key("weight_correction") in layer.tensors:
        raise layer.refusal(f"with {layer.key('weight_correction')!r}, which is not read yet")
    relative = layer.tensors.get(layer.key("weight_s_rel"))
    # The scales tell how many columns there are, and so how many bits a number has.
    groups = relative.shape[-1] if relative is not None and relative.shape else 0
    columns = groups * group
    scales = layer.beside("weight_s_rel", (rows, groups), torch.float8_e4m3fn, torch.uint8)
    bits = 8 * width // columns if columns else 0
    if bits not in (4, 6) or columns * bits != 8 * width:
        raise layer.refusal(
            f"and rows of {width} bytes, and {layer.key('weight_s_rel')!r} is for {columns} "
            "columns; expected 4 or 6 bits for each"
        )
    rotation = layer.rotation(columns)
    _check_columns(layer, columns, 16 if bits == 4 else 32)
    table: tuple[float, ...] = ()
    if bits == 4:
        table = tuple(float(level) for level in range(-8, 8))
        if layer.key("weight_codebook") in layer.tensors:
            codebook = layer.beside("weight_codebook", (16,), torch.float32)
            table = tuple(codebook.read().tolist())
    planes = (8,) if bits == 4 else (8, 4)
    packing = Packing(layer.weight, scales, columns // 16, planes, shared=group // 16)
    packed = layer.packed(f"W{bits}x16", rows, columns, packing)
    declared = Declared(layer.told, table=table, rotation=rotation, scale="weight_s_channel")
    return replace(packed, declared=declared)


def _check_columns(layer: _Layer, columns: int, divisor: int) -> None:
    if columns % divisor:
        raise layer.refusal(f"and has {columns} columns; expected a multiple of {divisor}")


@dataclass(frozen=True)
class _Format:
    """`read` and the keys that mean something to it."""

    read: _Read
    keys: tuple[str, ...] = ()


_TURNED = (_ROTATION, _ROTATION_SIZE)
FORMATS = {
    "float8_e4m3fn": _Format(_scaled(torch.float8_e4m3fn)),
    "float8_e5m2": _Format(_scaled(torch.float8_e5m2)),
    "int8_tensorwise": _Format(_int8, _TURNED),
    "convrot_w4a4": _Format(_int4, (*_TURNED, "quant_group_size")),
    "nvfp4": _Format(_nvfp4, ("group_size",)),
    "mxfp8": _Format(_mxfp8, ("group_size",)),
    "asym_w4a8_int8": _Format(_w4a8, (*_TURNED, "group_size")),
}


# --- files ---


def with_declarations(
    tensors: Mapping[str, StoredTensor], headers: Iterable[Mapping[str, str]], label: str
) -> dict[str, StoredTensor]:
    """The tensors as the file declares them, without the declarations.

    Those that this version does not read keep a `refusal`, for whoever wants them. FormatError on a
    declaration that cannot be read.
    """
    beside: dict[str, Any] = {}
    for key, stored in tensors.items():
        if key.endswith(BESIDE):
            if stored.nbytes > _MOST_TOLD:
                raise FormatError(f"{label!r}: {key!r} has {stored.nbytes} bytes; expected JSON")
            text = bytes(stored.read().reshape(-1).view(torch.uint8).tolist())
            beside[key.removesuffix(BESIDE)] = _parsed(text, key, label)
    in_header: dict[str, Any] = {}
    for header in headers:
        in_header |= _in_header(header, label)
    kept = {name: stored for name, stored in tensors.items() if not name.endswith(BESIDE)}
    declared = {name: told for layer, told in beside.items() if (name := _weight_of(layer, kept))}
    # It wins over what lies beside a weight, as in ComfyUI. It may leave out the names' prefix.
    names = match_names(kept, [*(f"{layer}.weight" for layer in in_header), *in_header])
    for layer, told in in_header.items():
        if name := names.get(f"{layer}.weight") or names.get(layer):
            declared[name] = told
    taken: set[str] = set()
    for name, told in declared.items():
        kept[name], parts = _as_declared(kept[name], _told(told), tensors)
        taken.update(parts)
    return {name: stored for name, stored in kept.items() if name not in taken}


def _weight_of(layer: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    return next((name for name in (f"{layer}.weight", layer) if name in tensors), None)


def _as_declared(
    stored: StoredTensor, told: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[StoredTensor, list[str]]:
    """A tensor as it is read, and the keys that became part of it."""
    layer = _Layer(stored, told, tensors, [])
    try:
        return _read(layer), layer.taken
    except FormatError as error:
        return replace(stored, declared=Declared(told, refusal=str(error))), []


def _read(layer: _Layer) -> StoredTensor:
    kind = layer.told.get("format")
    known = FORMATS.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise layer.refusal(f"which this version does not read; it reads {list(FORMATS)}")
    if not isinstance(layer.told.get("params", {}), dict):
        raise layer.refusal(f"with params={layer.told['params']!r:.60}; expected a table of keys")
    for key, value in layer.told.items():
        if value and key not in _HARMLESS and key not in known.keys:
            raise layer.refusal(f"with {key}={value!r:.60}, which is not known")
    if layer.weight.block_type is not None:
        raise layer.refusal(f"and its numbers are {layer.weight.block_type}")
    return known.read(layer)


def check_declared(stored: StoredTensor) -> Declared | None:
    """What the file declares of a tensor. FormatError where this version does not read it."""
    if stored.declared is not None and stored.declared.refusal:
        raise FormatError(stored.declared.refusal)
    return stored.declared


def declared_name(declared: Declared) -> str:
    """The format that a file declares for a tensor, in words."""
    turned = declared.told.get(_ROTATION) and declared.told.get("format") == "int8_tensorwise"
    return f"{declared.told.get('format')}{' with convrot' if turned else ''}"


def _told(declared: Mapping[str, Any]) -> dict[str, Any]:
    inner = declared.get("params")
    return {**(inner if isinstance(inner, dict) else {}), **declared}


def _in_header(header: Mapping[str, str], label: str) -> dict[str, Any]:
    text = header.get(HEADER_KEY)
    if text is None:
        return {}
    read = _parsed(text.encode(), HEADER_KEY, label)
    layers = read.get("layers", {})
    if not isinstance(layers, dict):
        raise FormatError(f"{label!r}: the layers of its {HEADER_KEY} are no table: {layers!r:.80}")
    return {layer: _table(told, f"{HEADER_KEY}: {layer}", label) for layer, told in layers.items()}


def _parsed(text: bytes, key: str, label: str) -> dict[str, Any]:
    try:
        read = parse_json(text.decode())
    except ValueError as error:
        raise FormatError(f"{label!r}: {key!r} is no JSON ({error})") from error
    return _table(read, key, label)


def _table(read: Any, key: str, label: str) -> dict[str, Any]:
    if not isinstance(read, dict):
        raise FormatError(f"{label!r}: expected a table of keys in {key!r}, found {read!r:.80}")
    return read
