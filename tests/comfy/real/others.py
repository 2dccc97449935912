# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the loaders that are seldom used: a second text encoder, CLIP vision, a folder of
the diffusers library, and a ControlNet that is a difference to its model.

usage: others.py COMFYUI_DIR MODELS_DIR     (about 2.4 GB, mostly the encoders, which have one size)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from checkpoints import Weights, filled
from safetensors.torch import load_file, save_file
from serve import prepare


def _clip_g() -> Weights:
    from comfy.sdxl_clip import SDXLClipG

    prefix = "transformer."
    weights = SDXLClipG(device="meta", dtype=torch.float32).state_dict()
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _vision(comfyui: Path) -> Weights:
    import comfy.ops
    from comfy.clip_model import CLIPVisionModelProjection

    config = json.loads((comfyui / "comfy" / "clip_vision_config_vitl.json").read_text())
    operations = comfy.ops.disable_weight_init
    return CLIPVisionModelProjection(config, torch.float32, "meta", operations).state_dict()


def _diffusers(models: Path) -> None:
    """A folder as the diffusers library writes it; the names inside are those the host knows too."""
    folder = models / "diffusers" / "tiny"
    prefix = "model.diffusion_model."
    whole = load_file(models / "checkpoints" / "sd15.safetensors")
    parts = {
        "unet/diffusion_pytorch_model.safetensors": {
            k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)
        },
        "vae/diffusion_pytorch_model.safetensors": load_file(models / "vae" / "vae.safetensors"),
        "text_encoder/model.safetensors": load_file(models / "text_encoders/clip_l.safetensors"),
    }
    for name, weights in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / name)
    (folder / "model_index.json").write_text("{}")


def make(comfyui: Path, models: Path) -> None:
    """Writes all of them beside what checkpoints.py made."""
    torch.manual_seed(7)
    (models / "clip_vision").mkdir(exist_ok=True)
    save_file(filled(_clip_g(), torch.float16), models / "text_encoders" / "clip_g.safetensors")
    vision = filled(_vision(comfyui), torch.float16)
    save_file(vision, models / "clip_vision" / "vitl.safetensors")
    control = load_file(models / "controlnet" / "cn.safetensors")
    difference = {name: tensor / 4 for name, tensor in control.items()}
    difference["difference"] = torch.ones(1)
    save_file(difference, models / "controlnet" / "cn-difference.safetensors")
    _diffusers(models)


if __name__ == "__main__":
    folder, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    sys.argv = [sys.argv[0], "--cpu"]
    kept = prepare(folder)
    import comfy.options

    comfy.options.enable_args_parsing()
    make(folder, target)
