# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of quantised weights, as ComfyUI's users have them, of what checkpoints.py made.

usage: kitchen.py MODELS_DIR     (about 0.3 GB; formats other than scaled fp8 need comfy_kitchen)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
Chosen = Callable[[str], bool]

# The host's name of a format -> comfy_kitchen's class, arguments for it, and what the file says.
FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "float8_e4m3fn": ("TensorCoreFP8Layout", {}, {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {"is_weight": True, "per_channel": True}, {}),
    "convrot_w4a4": (
        "TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 256}, {"convrot_groupsize": 256},
    ),
    "asym_w4a8_int8": (
        "AsymW4A8Int8Layout", {"symmetric": True}, {"group_size": 16, "convrot_groupsize": 256},
    ),
}  # fmt: skip


def in_blocks(name: str) -> bool:
    """Matrices of a diffusion model's blocks."""
    return "blocks" in name and name.endswith(".weight")


def in_layers(name: str) -> bool:
    """Matrices of a text encoder's layers."""
    return ".layers." in name and name.endswith(".weight")


def scaled(weights: Weights, chosen: Chosen) -> Weights:
    """Matrices as fp8 numbers, each with a scale beside it: the older form, and the commonest."""
    found: Weights = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights.items():
        found[name] = tensor
        if tensor.dim() == 2 and chosen(name):
            scale = tensor.float().abs().max() / 448
            found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + "scale_weight"] = scale
    return found


def quantised(weights: Weights, kind: str, chosen: Chosen) -> Weights:
    """Matrices in one of the host's formats, each with a mark that names it."""
    import comfy_kitchen.tensor

    layout, arguments, marks = FORMATS[kind]
    layout_class = getattr(comfy_kitchen.tensor, layout)
    mark = torch.tensor(list(json.dumps({"format": kind, **marks}).encode()), dtype=torch.uint8)
    found: Weights = {}
    for name, tensor in weights.items():
        if tensor.dim() != 2 or not chosen(name):
            found[name] = tensor
            continue
        numbers, params = layout_class.quantize(tensor.float(), **arguments)
        for suffix, part in layout_class.state_dict_tensors(numbers, params).items():
            # Files have block scales as bytes where safetensors does not know their type.
            known = part.dtype != torch.float8_e8m0fnu
            found[name + suffix] = part if known else part.view(torch.uint8)
        found[name.removesuffix("weight") + "comfy_quant"] = mark.clone()
    return found


def make(models: Path) -> None:
    """Writes all of them beside the files that they are made of."""

    def save(weights: Weights, *path: str) -> None:
        save_file({k: v.contiguous() for k, v in weights.items()}, models.joinpath(*path))

    folder = models / "diffusion_models"
    flux = load_file(folder / "flux2.safetensors")
    save(scaled(flux, in_blocks), "diffusion_models", "flux-scaled.safetensors")
    prefix = "model.diffusion_model."
    whole = load_file(models / "checkpoints" / "sd15.safetensors")
    unet = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    save(scaled(unet, in_blocks), "diffusion_models", "sd15-scaled.safetensors")
    clip = load_file(models / "text_encoders" / "clip_l.safetensors")
    save(scaled(clip, in_layers), "text_encoders", "clip_l-scaled.safetensors")
    try:
        import comfy_kitchen  # noqa: F401
    except ImportError:
        return
    for kind in FORMATS:
        save(quantised(flux, kind, in_blocks), "diffusion_models", f"flux-{kind}.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
