# SPDX-License-Identifier: Apache-2.0
"""What loaders give out, brought onto our patcher: MODEL, CLIP, VAE, CONTROL_NET, CLIP_VISION.

A loader's output is ours alone until it leaves the node, so its model is taken over as it is.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import distorch
from distorch.comfy import host
from distorch.comfy.patcher import DistorchPatcher, as_placed, is_ours
from distorch.comfy.placement import Placement
from distorch.runtime import wrapped

Taken = Callable[[Any], Any]  # patcher -> patcher
_log = logging.getLogger("distorch")

# Where an output keeps its patcher, and where else it holds the inner model.
_FIELDS = (
    ("control_model_wrapped", ("control_model",)),
    ("patcher", ("cond_stage_model", "first_stage_model", "model")),
)


def is_patcher(value: Any) -> bool:
    """Whether a loader's output is a model patcher itself."""
    return (
        hasattr(value, "load_device") and hasattr(value, "add_patches") and hasattr(value, "model")
    )


def patcher_of(value: Any) -> Any:
    """The patcher in a loader's output; None when there is none."""
    if is_patcher(value):
        return value
    for field, _ in _FIELDS:
        found = getattr(value, field, None)
        if found is not None and is_patcher(found):
            return found
    return None


def with_patcher(value: Any, change: Taken) -> Any:
    """The output with another patcher; outputs without one are given back as they are."""
    if is_patcher(value):
        return change(value)
    for field, holders in _FIELDS:
        before = getattr(value, field, None)
        if before is None or not is_patcher(before):
            continue
        after = change(before)
        for holder in holders:
            if getattr(value, holder, None) is before.model:
                setattr(value, holder, after.model)
        setattr(value, field, after)
        for name in ("load_device", "device"):
            if isinstance(getattr(value, name, None), torch.device):
                setattr(value, name, after.load_device)
        return value
    if value is not None:
        _log.info("%s has no model patcher: it stays as loaded", type(value).__name__)
    return value


def distributed(value: Any, placement: Placement) -> Any:
    """A loader's output whose weights follow the placement."""
    return with_patcher(value, functools.partial(_taken_over, placement=placement))


def _taken_over(patcher: Any, placement: Placement) -> DistorchPatcher:
    factory = getattr(patcher, "cached_patcher_init", None)
    if host.is_dynamic(patcher) and factory is None:
        static = type(patcher).__mro__[1](
            patcher.model, patcher.load_device, patcher.offload_device
        )
    else:
        static = host.static_patcher(patcher)
    settle_dtypes(static.model)
    made = as_placed(static, placement)
    if factory is not None:
        made.cached_patcher_init = (_reloaded, (factory,))
    made.model_size()  # a placement that cannot be honoured is refused here, on the node
    return made


def _reloaded(factory: tuple[Any, ...], disable_dynamic: bool = True) -> Any:
    """The host's way to a fresh model from the same file, on its static path."""
    make, arguments, *rest = factory
    try:
        found = make(*arguments, disable_dynamic=True)
    except TypeError:
        found = make(*arguments)
    return found[rest[0]] if rest else found


def settle_dtypes(model: nn.Module) -> None:
    """Weights as wide as the model says: the host's dynamic path leaves them as in the file."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            if parameter is None or dtype is None or parameter.dtype == dtype:
                continue
            if distorch.is_sharded(parameter):  # decoded to what it should be
                continue
            if parameter.is_floating_point() and type(parameter.data) is torch.Tensor:
                value = parameter.data.to(dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


def on_device(value: Any, device: str) -> Any:
    """A loader's output that computes on a device; nothing else changes."""
    return with_patcher(value, functools.partial(_retargeted, target=torch.device(device)))


def _retargeted(patcher: Any, target: torch.device) -> Any:
    if patcher.load_device == target:
        return patcher
    made = host.static_patcher(patcher) if target.type == "cpu" else patcher
    made.load_device = target
    if hasattr(made, "register_load_device"):
        made.register_load_device(target)
    return made


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy; quantised weights, which know no such thing, part by part."""
    memo: dict[int, Any] = {
        id(parameter): wrapped.as_parameter(wrapped.rebuilt(parameter, lambda _, p: p.clone()))
        for parameter in model.parameters()
        if wrapped.is_wrapper(parameter)
    }
    return copy.deepcopy(model, memo)


def own_copy(patcher: Any, placement: Placement) -> DistorchPatcher:
    """A placed patcher for a model that others may use: their weights stay where they are.

    The weights are read again from the file where the host knows it, else copied. A model of ours
    shares its weights with the new placement, as clones do.
    """
    if is_ours(patcher):
        return as_placed(patcher, placement)
    factory = getattr(patcher, "cached_patcher_init", None)
    base = patcher
    model = _copied(patcher.model) if factory is None else _reloaded(factory).model
    settle_dtypes(model)
    clone = base.clone()
    if host.is_dynamic(clone):
        clone = base.clone(model_override=(model, ({}, {}, {}, set())), disable_dynamic=True)
    clone.model = model
    clone.backup, clone.object_patches_backup, clone.hook_backup = {}, {}, {}
    clone.pinned = set()
    if hasattr(clone, "backup_buffers"):
        clone.backup_buffers = {}
    for name in ("model_loaded_weight_memory", "lowvram_patch_counter"):
        setattr(model, name, 0)
    model.current_weight_patches_uuid = None
    made = as_placed(clone, placement)
    made.parent = None
    if factory is not None:
        made.cached_patcher_init = (_reloaded, (factory,))
    made.model_size()
    return made
