# SPDX-License-Identifier: Apache-2.0
"""Scales that files keep beside narrow numbers: fp8 and int8 weights of several makers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from distorch.errors import FormatError
from distorch.formats.quantisation import check_declared
from distorch.formats.stored import StoredTensor

# Beside "x.weight": the factor on its numbers. {} is "x", the weight's own key {}.weight.
_FACTORS = ("{}.scale_weight", "{}.weight_scale", "{}.weight_scale_inv", "{}.weight.scale")
# Only where the file declares it (`quantisation`): of integers that have scales of their own.
_DECLARED = ("{}.weight_s_channel",)
# bitsandbytes: int8 rows, largest absolute value of each.
_LARGEST = ("{}.SCB", "{}.weight.SCB")
# Of what comes in or goes out, for arithmetic in the narrow dtype: not of the weight.
_OF_ACTIVATIONS = (
    "{}.scale_input", "{}.input_scale", "{}.activation_scale", "{}.output_scale", "{}.k_scale",
    "{}.v_scale",
)  # fmt: skip
# bitsandbytes: how the rows lie. 0 is one after the other.
_LAYOUT = "{}.weight_format"
# What lies beside a weight and is a tensor of its own; a module may do without it.
OF_THEIR_OWN = frozenset({
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "inv_freq",
    "original_inv_freq", "position_ids", "masked_bias", "in_proj_weight", "in_proj_bias",
})  # fmt: skip
BLOCK = 128  # rows and columns that share a scale where a grid of them is kept
_INT8_LARGEST = 127.0


def scale_keys(name: str) -> dict[str, str]:
    """Every key under which something of this weight's scales may stand, by its pattern."""
    stem = name.removesuffix(".weight")
    patterns = (*_FACTORS, *_DECLARED, *_LARGEST, *_OF_ACTIVATIONS, _LAYOUT)
    return {pattern: pattern.format(stem) for pattern in patterns}


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
    stored: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    free: Collection[str],
    *,
    kept_by_module: bool = False,
) -> tuple[Scales | None, list[str]]:
    """The scales of a weight and the keys that say them, among those that nobody claimed.

    `kept_by_module`: the module has a place for them, so that they are not missing.

    FormatError on scales of a shape that means nothing, or where the file declares a format whose
    numbers are not theirs times a scale.
    """
    declared = check_declared(stored)
    stem = stored.name.removesuffix(".weight")
    if not may_have_scales(stored) or (declared is not None and not declared.scale):
        return None, [key for key in (p.format(stem) for p in _OF_ACTIVATIONS) if key in free]
    taken = [key for key in (p.format(stem) for p in (*_OF_ACTIVATIONS, _LAYOUT)) if key in free]
    if declared is not None:
        key = f"{stem}.{declared.scale}"
        if key in free:
            values = _numbers(tensors[key], stored)
            _check_per_row(stored, key, values, may_be_one=declared.scale == "weight_scale")
            return _grid(stored, key, values), [*taken, key]
        if not kept_by_module:
            raise FormatError(
                f"{stored.name!r} is declared to be numbers with a scale (comfy_quant), and the "
                f"file has no {key!r}"
            )
        return None, taken
    for templates, divisor in ((_FACTORS, 1.0), (_LARGEST, _INT8_LARGEST)):
        for key in (template.format(stem) for template in templates):
            if key in free:
                _check_layout(tensors.get(_LAYOUT.format(stem)))
                values = _numbers(tensors[key], stored) / divisor
                return _grid(stored, key, values), [*taken, key]
    return None, taken


def may_have_scales(stored: StoredTensor) -> bool:
    """Whether a tensor's numbers are of those that files keep scales beside."""
    if stored.block_type is not None:
        return stored.declared is not None
    return stored.dtype.itemsize == 1


def _check_layout(layout: StoredTensor | None) -> None:
    if layout is not None and bool(layout.read().any()):
        raise FormatError(
            f"{layout.name!r} says that rows do not lie one after the other; expected 0"
        )


def _numbers(scale: StoredTensor, weight: StoredTensor) -> torch.Tensor:
    """Scales as float32. Bytes beside fp8 numbers are powers of two (E8M0)."""
    if prod(scale.shape) > prod(weight.shape):
        raise FormatError(
            f"{scale.name!r} has the shape {scale.shape}; expected no more scales than numbers of "
            f"{weight.name!r}, {weight.shape}"
        )
    values = scale.read()
    if scale.dtype == torch.uint8 and weight.dtype.is_floating_point and not scale.block_type:
        values = values.view(torch.float8_e8m0fnu)
    if scale.block_type or not values.is_floating_point():
        raise FormatError(
            f"{scale.name!r} has the dtype {scale.block_type or scale.dtype}; expected floating "
            f"scales for {weight.name!r} ({weight.dtype})"
        )
    return values.float()


def _check_per_row(
    stored: StoredTensor, key: str, values: torch.Tensor, *, may_be_one: bool
) -> None:
    """FormatError where a declared format has other scales than one, or one for each row."""
    rows = stored.shape[0] if stored.shape else 1
    if values.shape in ((rows,), (rows, 1)) or (may_be_one and values.numel() == 1):
        return
    raise FormatError(
        f"{key!r} has shape {tuple(values.shape)}; expected {'one scale, or ' * may_be_one}"
        f"one for each of the {rows} rows of {stored.name!r} (comfy_quant)"
    )


def _grid(stored: StoredTensor, key: str, values: torch.Tensor) -> Scales:
    rows = stored.shape[0] if len(stored.shape) > 1 else 1
    columns = max(1, prod(stored.shape) // max(rows, 1))
    if values.numel() == 1:
        return Scales(values.reshape(1, 1), (rows, columns))
    if values.numel() == rows and (values.dim() == 1 or values.shape[0] == rows):
        return Scales(values.reshape(rows, 1).contiguous(), (1, columns))
    if values.dim() == 2 and len(stored.shape) == 2 and values.numel() > 0:
        if values.shape == (-(-rows // BLOCK), -(-columns // BLOCK)):
            return Scales(values.contiguous(), (BLOCK, BLOCK))
        if rows % values.shape[0] == 0 == columns % values.shape[1]:
            block = rows // values.shape[0], columns // values.shape[1]
            return Scales(values.contiguous(), block)
    raise FormatError(
        f"{key!r} has shape {tuple(values.shape)}; expected one scale for {stored.name!r} "
        f"{stored.shape}, one per row, or one per block of rows and columns"
    )
