# SPDX-License-Identifier: Apache-2.0
"""What loaders give out, brought onto our patcher: MODEL, CLIP, VAE, CONTROL_NET, CLIP_VISION.

A loader's output is ours alone until it leaves the node, so its model is taken over as it is.
"""

from __future__ import annotations

import copy
import functools
import logging
import uuid
from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

import distorch
from distorch.comfy import bound, cross_device, host, live
from distorch.comfy.dynamic import DynamicPatcher
from distorch.comfy.patcher import KEY, NODE, DistorchPatcher, is_ours
from distorch.comfy.placement import Placement
from distorch.comfy.sampling import timed_sampling
from distorch.errors import PlacementError
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
        if field == "control_model_wrapped":
            cross_device.bridge(after.model)
        for name in ("load_device", "device"):
            if isinstance(getattr(value, name, None), torch.device):
                setattr(value, name, after.load_device)
        return value
    if value is not None:
        _log.info("%s has no model patcher: it stays as loaded", type(value).__name__)
    return value


def as_placed(patcher: Any, placement: Placement) -> DistorchPatcher:
    """A patcher of ours with everything that the host's own patcher had. PlacementError."""
    if not is_ours(patcher) and not host.is_hosts_own(patcher):
        raise PlacementError(
            f"this model comes in a {type(patcher).__module__}.{type(patcher).__name__}, which "
            "moves weights in its own way; load it with the host's loader or one of ours"
        )
    clone = patcher.clone()
    dynamic = host.is_dynamic(clone) and placement.compute != "cpu"
    # `clone()` copies everything that a ModelPatcher has, in whatever version of the host. A
    # constructor of ours would have to know each of these attributes. The class adds methods only.
    clone.__class__ = DynamicPatcher if dynamic else DistorchPatcher
    clone.attachments |= {KEY: placement, NODE: live.running_node()}
    clone.load_device = torch.device(placement.compute)
    if clone.offload_device.type != "cpu":
        clone.offload_device = torch.device("cpu")
    if dynamic:
        clone.register_load_device(clone.load_device)
    # Ours is none of those that wait for each other's end before pins are given up.
    getattr(clone.model, "dynamic_patchers", set()).discard(id(clone))
    clone.parent = patcher if is_ours(patcher) else None
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, timed_sampling)
    clone.model.model_loaded_weight_memory = (
        clone.model.model_loaded_weight_memory if is_ours(patcher) else 0
    )
    return clone


def distributed(value: Any, placement: Placement) -> Any:
    """A loader's output whose weights follow the placement."""
    return with_patcher(value, functools.partial(_taken_over, placement=placement))


def _taken_over(patcher: Any, placement: Placement) -> DistorchPatcher:
    host.let_go(patcher)  # some loaders have the host load a model at once
    factory = getattr(patcher, "cached_patcher_init", None)
    fresh = host.static_patcher(patcher)
    settle(fresh.model)
    made = as_placed(fresh, placement)
    if factory is not None:
        made.cached_patcher_init = (_fresh, (factory,))
    made.model_size()  # a placement that cannot be honoured is refused here, on the node
    return made


def _fresh(factory: tuple[Any, ...], disable_dynamic: bool = True) -> Any:
    """What the host calls for a fresh model of ours: always on its static path, if it has one."""
    found = host.reloaded(factory)
    settle(found.model)
    return found


def settle(model: nn.Module) -> None:
    """Weights and buffers as wide as the model says, and with memory.

    The host's dynamic path leaves them as in the file, and those that no file has without memory;
    it mends both when a layer runs.
    """
    made: dict[tuple[int, torch.dtype | None], Any] = {}  # a shared weight stays shared
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if tensor is None or distorch.is_sharded(tensor):
                    continue
                dtype = getattr(module, f"{name}_comfy_model_dtype", None)
                key = id(tensor), dtype
                if key not in made:
                    made[key] = _settled(tensor, dtype)
                tensors[name] = made[key]


def _settled(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    before = tensor.data
    if type(before) is not torch.Tensor:
        return tensor
    wanted = dtype if dtype is not None and before.is_floating_point() else before.dtype
    if not before.is_meta and before.dtype == wanted:
        return tensor
    after = torch.zeros(before.shape, dtype=wanted) if before.is_meta else before.to(wanted)
    return nn.Parameter(after, False) if isinstance(tensor, nn.Parameter) else after


def on_device(value: Any, device: str) -> Any:
    """A loader's output that computes on a device; nothing else changes."""
    return with_patcher(value, functools.partial(_retargeted, target=torch.device(device)))


def _retargeted(patcher: Any, target: torch.device) -> Any:
    if patcher.load_device == target:
        return patcher
    host.let_go(patcher)  # some loaders have the host load a model at once
    made = patcher
    if target.type == "cpu":
        made = host.cpu_patcher(patcher)
        settle(made.model)
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


def copy_of_output(value: Any, placement: Placement) -> Any:
    """A placed copy of what a loader gives out; what came in stays as it is for others."""
    if is_patcher(value):
        return own_copy(value, placement)
    copy_of = value.clone() if hasattr(value, "clone") else copy.copy(value)
    return with_patcher(copy_of, functools.partial(own_copy, placement=placement))


def own_copy(patcher: Any, placement: Placement) -> DistorchPatcher:
    """A placed patcher for a model that others may use: their weights stay where they are.

    The weights are read again from the file where the host knows it, else copied. A model of ours
    shares its weights with the new placement, as clones do.
    """
    if is_ours(patcher):
        return as_placed(patcher, placement)
    factory = getattr(patcher, "cached_patcher_init", None)
    model = _copied(patcher.model) if factory is None else _fresh(factory).model
    settle(model)
    clone = host.clone_around(patcher, model)
    bound.rebind(clone, patcher.model, model)
    made = as_placed(clone, placement)
    made.parent = None
    # By this the host finds a model's copies on other GPUs. Those of the other model are not ours.
    made.clone_base_uuid = uuid.uuid4()
    if factory is not None:
        made.cached_patcher_init = (_fresh, (factory,))
    made.model_size()
    return made
