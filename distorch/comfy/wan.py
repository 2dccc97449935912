"""Block swap for WanVideoWrapper: blocks live on a donor and stream one way, with look-ahead.

Their sampler moves whole blocks to the device and back in every step. With a swap device, the same
blocks are sharded there instead, and their sampler is told of no swap at all.
"""

from __future__ import annotations

from typing import Any

import distorch
from distorch.comfy import host
from distorch.runtime import distribution

_SAMPLER = "WanVideoSampler"


def swapped_rules(arguments: dict[str, Any], donor: str) -> list[tuple[str, str]]:
    """(pattern, donor) for the blocks that their arguments would swap."""
    rules = [(f"blocks.{i}.*", donor) for i in range(int(arguments.get("blocks_to_swap", 0)))]
    vace = int(arguments.get("vace_blocks_to_swap", 0) or 0)
    rules += [(f"vace_blocks.{i}.*", donor) for i in range(vace)]
    if arguments.get("offload_txt_emb"):
        rules.append(("text_embedding.*", donor))
    if arguments.get("offload_img_emb"):
        rules.append(("img_emb.*", donor))
    return rules


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
        rules = swapped_rules(swap, donor)
        distorch.distribute(transformer, f"{device},*", compute=device, rules=rules)
    options["block_swap_args"] = None
    try:
        return host.call_node(_SAMPLER, {**arguments, "force_offload": False})
    finally:
        options["block_swap_args"] = swap
        if distribution.is_distributed(transformer):
            leave = "cpu" if arguments.get("force_offload", True) else device
            distorch.undistribute(transformer, leave)
