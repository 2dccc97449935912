# SPDX-License-Identifier: Apache-2.0
"""FLUX transformers with random weights, and ways to run them with their weights elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import distorch


@dataclass(frozen=True)
class Size:
    """Blocks of a FLUX transformer and tokens of its inputs."""

    double: int
    single: int
    heads: int
    head: int  # channels of a head: a block is heads * head wide
    axes: tuple[int, int, int]  # of a head's channels, for positions
    text_width: int
    image: int  # tokens
    text: int
    dtype: torch.dtype


FULL = Size(19, 38, 24, 128, (16, 56, 56), 4096, 4096, 512, torch.bfloat16)
TINY = Size(2, 3, 2, 16, (4, 6, 6), 32, 16, 8, torch.float32)
_CHANNELS, _POOLED = 64, 768
MATRICES = 1  # min_bytes=: whatever has one dimension stays on the device


def transformer(size: Size, device: torch.device | str = "cpu") -> nn.Module:
    """Made on a device, which takes a tenth of the time there; the same weights each time."""
    from diffusers import FluxTransformer2DModel

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            made = FluxTransformer2DModel(
                in_channels=_CHANNELS, num_layers=size.double, num_single_layers=size.single,
                attention_head_dim=size.head, num_attention_heads=size.heads,
                joint_attention_dim=size.text_width, pooled_projection_dim=_POOLED,
                axes_dims_rope=size.axes,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    made.requires_grad_(False)
    return made.eval()


def inputs(size: Size, device: torch.device) -> dict[str, Any]:
    """One step's arguments."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, size.dtype)

    return {
        "hidden_states": noise(1, size.image, _CHANNELS),
        "encoder_hidden_states": noise(1, size.text, size.text_width),
        "pooled_projections": noise(1, _POOLED),
        "timestep": torch.tensor([0.5]).to(device, size.dtype),
        "img_ids": torch.zeros(size.image, 3).to(device, size.dtype),
        "txt_ids": torch.zeros(size.text, 3).to(device, size.dtype),
        "return_dict": False,
    }


def nbytes(module: nn.Module) -> int:
    """Of all parameters."""
    return sum(p.nbytes for p in module.parameters())


def block_bytes(size: Size) -> tuple[int, int]:
    """Bytes of a double block and of a single block."""
    made = transformer(size, "meta")
    return nbytes(made.transformer_blocks[0]), nbytes(made.single_transformer_blocks[0])


def largest_block(module: nn.Module) -> int:
    """Bytes of the largest block."""
    return max(nbytes(block) for block in blocks(module))


def blocks(module: nn.Module) -> list[nn.Module]:
    """In the order in which they run."""
    return [*module.transformer_blocks, *module.single_transformer_blocks]


# Each takes a module on the device and gives it back with its weights where they are to be.
Offloader = Callable[[nn.Module, torch.device], nn.Module]


def resident(module: nn.Module, device: torch.device) -> nn.Module:
    """All weights on the device."""
    return module.to(device)


def streamed(prefetch: int, kept: int = 0) -> Offloader:
    """distorch: weights in RAM, `kept` bytes of them on the device, `prefetch` bytes of ring.

    Where the host computes, they are on disk.
    """

    def offload(module: nn.Module, device: torch.device) -> nn.Module:
        donor = "disk" if device.type == "cpu" else "cpu"
        spec = f"{device},{kept}b;{donor},*"
        distorch.distribute(module, spec, min_bytes=MATRICES, prefetch=prefetch)
        report = distorch.report(module)
        assert report.ok, report.problems
        return module

    return offload


def group_offloading(leaves: bool, streams: bool) -> Offloader:
    """diffusers' group offloading, block by block or module by module."""

    def offload(module: nn.Module, device: torch.device) -> nn.Module:
        from diffusers.hooks import apply_group_offloading

        module.to("cpu")
        by_block = {"offload_type": "block_level", "num_blocks_per_group": 1}
        kind = {"offload_type": "leaf_level"} if leaves else by_block
        apply_group_offloading(
            module, device, torch.device("cpu"), use_stream=streams, non_blocking=streams,
            record_stream=streams, **kind,
        )  # fmt: skip
        return module

    return offload


def accelerate_offloading(module: nn.Module, device: torch.device) -> nn.Module:
    """accelerate's cpu_offload."""
    from accelerate import cpu_offload

    offloaded: nn.Module = cpu_offload(module.to("cpu"), execution_device=device)
    return offloaded


def moved_by_hand(module: nn.Module, device: torch.device) -> nn.Module:
    """Each block goes to the device before it runs, and back: `.to()` in forward hooks."""

    def come(block: nn.Module, _: object) -> None:
        block.to(device)

    def leave(block: nn.Module, *_: object) -> None:
        block.to("cpu")

    for block in blocks(module):
        block.to("cpu")
        block.register_forward_pre_hook(come)
        block.register_forward_hook(leave)
    return module


FLEX_STEPS = (1, 3)  # that look for what is used, and that are timed, before it plans


def flextensor_offloading(module: nn.Module, device: torch.device) -> nn.Module:
    """NVIDIA's FlexTensor, as its README has it: blocks on the host, the rest on the device."""
    import flextensor

    for block in blocks(module):
        block.to("cpu")
    config = flextensor.OffloadConfig(
        gpu_device=device.index, discovery_iters=FLEX_STEPS[0], profiling_iters=FLEX_STEPS[1],
        include_patterns=["transformer_blocks.*", "single_transformer_blocks.*"],
    )  # fmt: skip
    offloaded: nn.Module = flextensor.offload(module, config=config)
    return offloaded
