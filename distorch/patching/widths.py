# SPDX-License-Identifier: Apache-2.0
"""Input layers that a LoRA makes wider.

Control LoRAs of FLUX (depth, canny) want an image beside the latents: their factors for the layer
that takes the model's input have twice its columns. While such a LoRA is on, at whatever strength,
the layer's weight has as many columns, of which the added ones are zero before the patch. The
layer's `in_features` and the model's `in_channels` say so. When the last such LoRA is taken off,
the layer is again what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from distorch.formats.plain_names import base_name
from distorch.lora import Applied, StoredRows, merge, padded
from distorch.runtime.groups import named_members

_NAMES = ("x_embedder", "img_in")  # of such layers; others may have as many inputs by chance

# Models that are wide now, and whose configuration says no number of outputs: it is that of the
# inputs that they had before, which stand here.
_OUTPUTS_AS_INPUTS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def input_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that take the input of a model, which says its width as `in_channels`."""
    for model in module.modules():
        channels = _in_channels(model)
        found = {
            name: child
            for name, child in model.named_children()
            if isinstance(child, nn.Linear) and child.in_features == channels and _is_plain(child)
        }
        named = [child for name, child in found.items() if name.endswith(_NAMES)]
        likely = named or list(found.values())
        if len(likely) == 1:  # one number cannot say the widths of two
            yield likely[0]


def _is_plain(layer: nn.Linear) -> bool:
    """Whether it keeps its weight as such, number by number."""
    weight = layer._parameters.get("weight")
    return (
        weight is not None
        and tuple(weight.shape) == (layer.out_features, layer.in_features)
        and (weight.is_floating_point() or weight.dtype == torch.int8)
    )


def _in_channels(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for value in (getattr(config, "in_channels", None), vars(model).get("in_channels")):
        if isinstance(value, int):
            return value
    return None


def follow(module: nn.Module, names: Collection[str]) -> None:
    """Makes what layers and models say of their width what these weights have: all, or nothing
    after an interrupt.
    """
    changed = {
        member.owner: (member.owner.in_features, int(member.parameter.shape[1]))
        for member in (named_members(module) if names else ())
        if base_name(member.name) in names
        and isinstance(member.owner, nn.Linear)
        and member.owner.in_features != member.parameter.shape[1]
    }
    with ExitStack() as undo:
        for model in module.modules() if changed else ():
            for layer in model.children():
                if layer in changed:
                    before, width = changed[layer]
                    undo.callback(_set_in_channels, model, width, before)
                    _set_in_channels(model, before, width)
        for layer, (before, width) in changed.items():
            undo.callback(setattr, layer, "in_features", before)
            layer.in_features = width
        undo.pop_all()


def _set_in_channels(model: Any, before: int, width: int) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "in_channels", None) == before:
        changed: dict[str, int | None] = {"in_channels": width}
        if getattr(config, "out_channels", width) is None:  # as many as inputs
            _OUTPUTS_AS_INPUTS[model] = changed["out_channels"] = before
        elif _OUTPUTS_AS_INPUTS.get(model) == width:
            del _OUTPUTS_AS_INPUTS[model]
            changed["out_channels"] = None
        if hasattr(model, "register_to_config"):  # diffusers' configurations are frozen
            model.register_to_config(**changed)
        else:
            for key, value in changed.items():
                setattr(config, key, value)
    if vars(model).get("in_channels") == before:
        model.in_channels = width


def widened(
    patches: Applied,
    values: torch.Tensor,
    rows: StoredRows | None,
    shape: Sequence[int],
    width: int,
) -> tuple[Applied, torch.Tensor]:
    """Patches and values of a weight of that shape, as those of one with `width` columns: plain
    numbers, of `values`' dtype or float32.
    """
    base = values if rows is None else merge([], values, torch.float32, rows, shape=shape)
    wide = [
        (replace(patch, kind=padded(patch.kind, shape[1], width)), strength)
        for patch, strength in patches
    ]
    return wide, functional.pad(base, (0, width - shape[1]))
