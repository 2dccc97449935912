"""Block swap for WanVideoWrapper: blocks live on a donor and stream one way, with look-ahead.

Their sampler moves whole blocks to the device and back in every step. With a swap device, the same
blocks are sharded there instead, and their sampler is told of no swap at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

import distorch
from distorch.comfy import host
from distorch.planner import Plan
from distorch.runtime import distribution
from distorch.runtime.groups import can_leave_device

_SAMPLER = "WanVideoSampler"


def swapped(arguments: dict[str, Any]) -> tuple[str, ...]:
    """What the names of the weights that their arguments would swap begin with."""
    found = [f"blocks.{i}." for i in range(int(arguments.get("blocks_to_swap", 0)))]
    found += [f"vace_blocks.{i}." for i in range(int(arguments.get("vace_blocks_to_swap") or 0))]
    if arguments.get("offload_txt_emb"):
        found.append("text_embedding.")
    if arguments.get("offload_img_emb"):
        found.append("img_emb.")
    return tuple(found)


def swap_plan(transformer: nn.Module, device: str, donor: str, beginnings: tuple[str, ...]) -> Plan:
    """Those weights on the donor, all others on the device."""
    plan = distorch.plan(transformer, f"{device},*", compute=device)
    moves = {
        name: donor
        for name, parameter in transformer.named_parameters(remove_duplicate=False)
        if name.startswith(beginnings) and can_leave_device(parameter)
    }
    return replace(plan, placement={**plan.placement, **moves})


def sampled(arguments: dict[str, Any], device: str) -> tuple[Any, ...]:
    """Their sampler's outputs. Weights are plain again and off the device afterwards, if asked."""
    model = arguments["model"]
    options = model.model_options.get("transformer_options", {})
    swap = options.get("block_swap_args")
    if not isinstance(swap, dict) or "swap_device" not in swap:
        return host.call_node(_SAMPLER, arguments)
    transformer = model.model.diffusion_model
    donor = swap["swap_device"]
    if distribution.is_distributed(transformer):  # an error left it so
        distorch.undistribute(transformer, "cpu")
    if donor != device:
        plan = swap_plan(transformer, device, donor, swapped(swap))
        distorch.distribute(transformer, plan=plan)
    options["block_swap_args"] = None
    try:
        return host.call_node(_SAMPLER, {**arguments, "force_offload": False})
    finally:
        options["block_swap_args"] = swap
        if distribution.is_distributed(transformer):
            leave = "cpu" if arguments.get("force_offload", True) else device
            distorch.undistribute(transformer, leave)
