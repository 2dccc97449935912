"""Scales that files keep beside narrow numbers: fp8 and int8 weights of several makers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distorch.errors import FormatError
from distorch.formats.safetensors import StoredTensor

# Beside "x.weight": the factor on its numbers. {} is "x", the weight's own key {}.weight.
_FACTORS = ("{}.scale_weight", "{}.weight_scale", "{}.weight_scale_inv", "{}.weight.scale")
# bitsandbytes: int8 rows, largest absolute value of each.
_LARGEST = ("{}.SCB", "{}.weight.SCB")
# Said beside it, and not needed to have the numbers.
_OTHER = (
    "{}.scale_input", "{}.input_scale", "{}.weight_format", "{}.comfy_quant", "{}.weight.absmax",
)  # fmt: skip
_MARKERS = ("scaled_fp8", "model.diffusion_model.scaled_fp8")
BLOCK = 128  # rows and columns that share a scale where a grid of them is kept
_INT8_LARGEST = 127.0


def scale_keys(name: str) -> dict[str, str]:
    """Every key under which something of this weight's scales may stand, by its pattern."""
    stem = name.removesuffix(".weight")
    return {pattern: pattern.format(stem) for pattern in (*_FACTORS, *_LARGEST, *_OTHER)}


def own_scales(owner: nn.Module, key: str) -> str | None:
    """The name of the scales that a module keeps itself for its narrow weight `key`, if it does."""
    stem = f".{key}".removesuffix(".weight")
    names = (pattern.format(stem).removeprefix(".") for pattern in (*_FACTORS, *_LARGEST))
    kept = {*owner._parameters, *owner._buffers}
    return next((name for name in names if name in kept), None)


@dataclass(frozen=True)
class Scales:
    """`grid` float32 [grid rows, grid columns]: one for `block` (rows, columns) numbers."""

    grid: torch.Tensor
    block: tuple[int, int]


def attach_scales(
    stored: StoredTensor, tensors: Mapping[str, StoredTensor], unclaimed: Sequence[str]
) -> tuple[Scales | None, list[str]]:
    """The scales of a narrow weight and the keys that say them, among those nobody claimed.

    FormatError on scales of a shape that means nothing.
    """
    stem = stored.name.removesuffix(".weight")
    free = set(unclaimed)
    taken = [key for key in (*(t.format(stem) for t in _OTHER), *_MARKERS) if key in free]
    for templates, divisor in ((_FACTORS, 1.0), (_LARGEST, _INT8_LARGEST)):
        for key in (template.format(stem) for template in templates):
            if key in free:
                values = tensors[key].read().float() / divisor
                return _grid(stored, key, values), [*taken, key]
    return None, [key for key in taken if key in _MARKERS]


def _grid(stored: StoredTensor, key: str, values: torch.Tensor) -> Scales:
    rows = stored.shape[0] if len(stored.shape) > 1 else 1
    columns = max(1, stored.nbytes // max(rows, 1))
    if values.numel() == 1:
        return Scales(values.reshape(1, 1), (rows, columns))
    if values.numel() == rows:
        return Scales(values.reshape(rows, 1).contiguous(), (1, columns))
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(values.shape) == grid:
        return Scales(values.contiguous(), (BLOCK, BLOCK))
    raise FormatError(
        f"{key!r} has shape {tuple(values.shape)}; expected one scale for {stored.name!r} "
        f"{stored.shape}, one per row, or one per {BLOCK} x {BLOCK} block"
    )
