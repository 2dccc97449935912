"""What a file says of its numbers: ComfyUI's `comfy_quant`, beside a weight or in the header.

A declaration names a format and what belongs to it. It is never passed over: the same bytes mean
other numbers under another format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from distorch.errors import FormatError
from distorch.formats.plain_names import match_names
from distorch.formats.safetensors import StoredTensor

BESIDE = ".comfy_quant"
HEADER_KEY = "_quantization_metadata"

# Formats whose numbers are theirs times a scale.
FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
# Keys that change nothing of the numbers, or say what the shapes show.
_HARMLESS = frozenset({
    "format", "params", "full_precision_matrix_mult", "num_experts", "linear_dtype", "per_row",
    "orig_dtype", "convrot", "convrot_groupsize",
})  # fmt: skip


def with_declarations(
    tensors: Mapping[str, StoredTensor], headers: Iterable[Mapping[str, str]], label: str
) -> dict[str, StoredTensor]:
    """The tensors, each with what the file declares of it; what declares is none of them.

    FormatError on a declaration that cannot be read.
    """
    found: dict[str, Any] = {}
    for key, stored in tensors.items():
        if key.endswith(BESIDE):
            text = bytes(stored.read().reshape(-1).view(torch.uint8).tolist())
            found[key.removesuffix(BESIDE)] = _parsed(text, key, label)
    for header in headers:  # it wins over what lies beside a weight, as in ComfyUI
        found |= _in_header(header, label)
    kept = {name: stored for name, stored in tensors.items() if not name.endswith(BESIDE)}
    # Headers may leave out the prefix that the tensors have.
    names = match_names(kept, [*(f"{layer}.weight" for layer in found), *found])
    for layer, told in found.items():
        if name := names.get(f"{layer}.weight") or names.get(layer):
            kept[name] = replace(kept[name], declared=told)
    return kept


def check_declared(stored: StoredTensor) -> bool:
    """Whether the file declares a format for a tensor, under which it then needs a scale.

    FormatError where its numbers are not simply numbers times a scale.
    """
    if stored.declared is None:
        return False
    told = _told(stored.declared)
    kind = told.get("format")
    start = f"{stored.name!r} is stored in the format {kind!r} (comfy_quant)"
    if not isinstance(kind, str) or kind not in FORMATS:
        raise FormatError(f"{start}, which this version does not read; it reads {list(FORMATS)}")
    if told.get("convrot"):
        raise FormatError(
            f"{start} with its columns rotated (convrot), which this version does not undo; load a "
            "version of the file without convrot"
        )
    unknown = [key for key, value in told.items() if key not in _HARMLESS and value]
    if unknown:
        raise FormatError(f"{start} with {unknown[0]}={told[unknown[0]]!r:.60}, which is not known")
    if stored.dtype != FORMATS[kind]:
        raise FormatError(f"{start}, and its numbers are {stored.dtype}")
    return True


def declared_name(stored: StoredTensor) -> str:
    """The format that a file declares for a tensor, in words."""
    told = _told(stored.declared or {})
    return f"{told.get('format')}{' with convrot' if told.get('convrot') else ''}"


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
        read = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{label!r}: {key!r} is no JSON ({error})") from error
    return _table(read, key, label)


def _table(read: Any, key: str, label: str) -> dict[str, Any]:
    if not isinstance(read, dict):
        raise FormatError(f"{label!r}: expected a table of keys in {key!r}, found {read!r:.80}")
    return read
