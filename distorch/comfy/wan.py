# SPDX-License-Identifier: Apache-2.0
"""Block swap for WanVideoWrapper: blocks live on a donor and stream one way, with look-ahead.

Note [Their sampler]
It reads weights into the model when it begins, puts blocks aside, and moves them to the device and
back in every step. With a swap device, what it has put aside when the model runs for the first time
goes to that donor, and the model is told of no swap. It works on their model through a hook that
every `nn.Module` has, so that neither their loading nor their sampling is done by us.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import distorch
from distorch.comfy import host
from distorch.planner import Plan
from distorch.runtime import distribution
from distorch.runtime.groups import can_leave_device

_SAMPLER = "WanVideoSampler"
_PUT_ASIDE = ("blocks.", "vace_blocks.", "text_embedding.", "img_emb.")
# What their model asks in every step, and what says "no".
_FLAGS = {
    "blocks_to_swap": -1, "vace_blocks_to_swap": -1, "prefetch_blocks": 0,
    "offload_txt_emb": False, "offload_img_emb": False,
}  # fmt: skip


def swap_arguments(model: Any) -> dict[str, Any] | None:
    """What their block swap node said of this model, if a swap device was given with it.

    Newer versions keep it in the options of the patcher, older ones in the inner model.
    """
    options = model.model_options.get("transformer_options", {})
    found = options.get("block_swap_args")
    if found is None and hasattr(model.model, "__getitem__"):
        try:
            found = model.model["block_swap_args"]
        except (KeyError, AttributeError):
            return None
    return found if isinstance(found, dict) and "swap_device" in found else None


def swap_plan(transformer: nn.Module, device: str, donor: str) -> Plan:
    """Blocks that are not on the device go to the donor; what else is not there stays in RAM."""
    plan = distorch.plan(transformer, f"{device},*", compute=device)
    moves = {
        name: donor if name.startswith(_PUT_ASIDE) else "cpu"
        for name, parameter in transformer.named_parameters(remove_duplicate=False)
        if parameter.device != torch.device(device) and can_leave_device(parameter)
    }
    return replace(plan, placement={**plan.placement, **moves})


def _stream(transformer: nn.Module, device: str, donor: str) -> dict[str, Any]:
    """What was put aside streams from the donor from now on; the flags that the model had."""
    distorch.distribute(transformer, plan=swap_plan(transformer, device, donor), progress=False)
    before = {name: getattr(transformer, name) for name in _FLAGS if hasattr(transformer, name)}
    for name in before:
        setattr(transformer, name, _FLAGS[name])
    return before


def _offloaded(transformer: nn.Module) -> None:
    """Their own offloading, for what it does beyond moving weights: they are off already."""
    module = sys.modules.get(host.node_class(_SAMPLER).__module__)
    theirs = getattr(module, "offload_transformer", None)
    if theirs is not None:
        theirs(transformer)


def sampled(arguments: dict[str, Any], device: str) -> tuple[Any, ...]:
    """Their sampler's outputs. Weights are plain again and off the device afterwards, if asked."""
    model = arguments["model"]
    swap = swap_arguments(model)
    if swap is None:
        return host.call_node(_SAMPLER, arguments)
    transformer = model.model.diffusion_model
    if distribution.is_distributed(transformer):  # an error left it so
        distorch.undistribute(transformer, "cpu")

    flags: dict[str, Any] = {}

    def before_first_step(module: nn.Module, _: Any) -> None:
        hook.remove()
        flags.update(_stream(module, device, swap["swap_device"]))

    hook = transformer.register_forward_pre_hook(before_first_step)
    leave = arguments.get("force_offload", True)
    try:
        found = host.call_node(_SAMPLER, {**arguments, "force_offload": False})
    finally:
        hook.remove()
        for name, value in flags.items():
            setattr(transformer, name, value)
        if distribution.is_distributed(transformer):
            distorch.undistribute(transformer, "cpu" if leave else device)
    if leave:
        _offloaded(transformer)
    return found
