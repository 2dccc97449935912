# SPDX-License-Identifier: Apache-2.0
"""Block swap for WanVideoWrapper: blocks live on a donor and stream one way, with look-ahead.

Note [Their sampler]
It reads weights into the model when it begins, puts blocks aside, and moves them to the device and
back in every step. With a swap device, what it has put aside when the model runs for the first time
goes to that donor, and the model is told of no swap. With a spec, all weights go where it says. It
works on their model through a hook that every `nn.Module` has, so that neither their loading nor
their sampling is done by us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import distorch
from distorch.comfy import host, weights
from distorch.comfy.placement import Placement, expert_spec
from distorch.planner import Plan
from distorch.runtime import distribution
from distorch.runtime.groups import can_leave_device

Call = Callable[[dict[str, Any]], tuple[Any, ...]]  # their node: inputs to outputs
_SAMPLER = "WanVideoSampler"
_PUT_ASIDE = ("blocks.", "vace_blocks.", "text_embedding.", "img_emb.")
# What their model asks in every step, and what says "no".
_FLAGS = {
    "blocks_to_swap": -1, "vace_blocks_to_swap": -1, "prefetch_blocks": 0,
    "offload_txt_emb": False, "offload_img_emb": False,
}  # fmt: skip


def all_aside(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of their block swap with which it puts as much aside as it can."""
    declared = {name: kind for part in inputs.values() for name, kind in part.items()}
    blocks = {n: kind[1]["max"] for n, kind in declared.items() if n.endswith("blocks_to_swap")}
    return blocks | {name: True for name in declared if name.startswith("offload_")}


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


def swap_plan(transformer: nn.Module, device: str, donor: str, spec: str) -> Plan:
    """By the spec if there is one. Else blocks that are not on the device go to the donor, and what
    else is not there stays in RAM.
    """
    if spec.strip():
        total = sum(parameter.nbytes for parameter in transformer.parameters())
        wanted = Placement(expert_spec(spec, device), device)
        return distorch.plan(transformer, wanted.spec, **wanted.options(total))
    plan = distorch.plan(transformer, f"{device},*", compute=device)
    moves = {
        name: donor if name.startswith(_PUT_ASIDE) else "cpu"
        for name, parameter in transformer.named_parameters(remove_duplicate=False)
        if parameter.device != torch.device(device) and can_leave_device(parameter)
    }
    return replace(plan, placement={**plan.placement, **moves})


def _stream(transformer: nn.Module, device: str, swap: Mapping[str, Any]) -> dict[str, Any]:
    """What was put aside streams from donors from now on; the flags that the model had."""
    plan = swap_plan(transformer, device, swap["swap_device"], swap.get("spec", ""))
    distorch.distribute(transformer, plan=plan, progress=False)
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


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _bring(module: nn.Module, names: set[str], device: str) -> None:
    """These parameters and buffers of a plain module to the device. A shared one stays shared."""
    before = [(name, tensor) for name, tensor in _tensors(module) if name in names]
    brought = {id(tensor): tensor.detach().to(device) for _, tensor in before}
    for name, tensor in before:
        owner, key = weights.owner_of(module, name)
        after = brought[id(tensor)]
        if not isinstance(tensor, nn.Parameter):
            owner._buffers[key] = after
            continue
        if not isinstance(after, nn.Parameter):
            after = brought[id(tensor)] = nn.Parameter(after, tensor.requires_grad)
        owner._parameters[key] = after


def sampled(call: Call, arguments: dict[str, Any], device: str) -> tuple[Any, ...]:
    """The outputs of their sampler, which is `call`. Weights are plain again afterwards. They are
    off the device if that was asked for, else where they were before the first step.
    """
    model = arguments["model"]
    swap = swap_arguments(model)
    if swap is None:
        return call(arguments)
    transformer = model.model.diffusion_model
    if distribution.is_distributed(transformer):  # an error left it so
        distorch.undistribute(transformer, "cpu")

    flags: dict[str, Any] = {}
    there: set[str] = set()  # what was on the device

    def before_first_step(module: nn.Module, _: Any) -> None:
        hook.remove()
        there.update(name for name, tensor in _tensors(module) if str(tensor.device) == device)
        flags.update(_stream(module, device, swap))

    hook = transformer.register_forward_pre_hook(before_first_step)
    leave = arguments.get("force_offload", True)
    try:
        found = call({**arguments, "force_offload": False})
    finally:
        hook.remove()
        for name, value in flags.items():
            setattr(transformer, name, value)
        if distribution.is_distributed(transformer):
            distorch.undistribute(transformer, "cpu")
            if not leave:
                _bring(transformer, there, device)
    if leave:
        _offloaded(transformer)
    return found
