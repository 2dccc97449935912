# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints that ComfyUI's detection accepts, with random weights.

usage: checkpoints.py COMFYUI_DIR MODELS_DIR     (about 1.1 GB, mostly CLIP-L and the VAE)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from serve import prepare

Weights = dict[str, torch.Tensor]
_random = torch.Generator()


def filled(like: Weights, dtype: torch.dtype) -> Weights:
    """Random values of the size that keeps activations near 1."""
    found: Weights = {}
    for name, tensor in like.items():
        if not tensor.is_floating_point():
            found[name] = torch.arange(tensor.numel()).reshape(tensor.shape)
            continue
        values = torch.randn(tensor.shape, generator=_random)
        if name.endswith(".bias"):
            values *= 0.02
        elif tensor.dim() == 1:
            values = 1 + 0.05 * values
        else:
            values /= tensor[0].numel() ** 0.5
        found[name] = values.to(dtype)
    return found


def prefixed(weights: Weights, prefix: str) -> Weights:
    """The same under longer names."""
    return {prefix + name: tensor for name, tensor in weights.items()}


def lora(weights: Weights, names: Iterable[str], rank: int, stem: Callable[[str], str]) -> Weights:
    """A LoRA on these weights."""
    found: Weights = {}
    for name in names:
        rows, columns = weights[name].shape
        key = stem(name.removesuffix(".weight"))
        down = torch.randn(rank, columns, generator=_random) * 0.05
        up = torch.randn(rows, rank, generator=_random) * 0.05
        found[f"{key}.lora_down.weight"] = down.to(torch.float16)
        found[f"{key}.lora_up.weight"] = up.to(torch.float16)
        found[f"{key}.alpha"] = torch.tensor(rank / 2)
    return found


def _flux() -> Weights:
    import inspect

    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams

    config = {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "vec_in_dim": 768,
        "context_in_dim": 4096, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 4, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
        "guidance_embed": True, "txt_ids_dims": [],
    }  # fmt: skip
    known = inspect.signature(FluxParams).parameters
    config = {name: value for name, value in config.items() if name in known}
    model = Flux(
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **config
    )
    # As published files have it, and every version of the host knows.
    return {
        name.replace("_norm.weight", "_norm.scale"): v for name, v in model.state_dict().items()
    }


def _sd15() -> tuple[Weights, Weights]:
    """The UNet and a ControlNet for it: two levels of one block."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {
        "image_size": 32, "in_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
        "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
        "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False,
        "device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init,
    }  # fmt: skip
    unet = UNetModel(out_channels=4, transformer_depth_output=[1, 1, 1, 1], **config)
    return unet.state_dict(), ControlNet(hint_channels=3, **config).state_dict()


def _vae() -> Weights:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    return AutoencoderKL(ddconfig=config, embed_dim=4).state_dict()


def _clip() -> Weights:
    from comfy.sd1_clip import SDClipModel

    prefix = "transformer."
    weights = SDClipModel(device="cpu", dtype=torch.float32).state_dict()
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _matrices(weights: Weights, part: str) -> list[str]:
    return [k for k, v in weights.items() if k.endswith(".weight") and v.dim() == 2 and part in k]


def make(models: Path) -> None:
    """Writes all of them, each into the folder where ComfyUI looks for its kind."""

    def save(weights: Weights, *path: str) -> None:
        target = models.joinpath(*path)
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, target)

    _random.manual_seed(0)
    flux = _flux()
    save(filled(flux, torch.bfloat16), "diffusion_models", "flux.safetensors")
    save(filled(flux, torch.float16), "diffusion_models", "flux2.safetensors")
    blocks = _matrices(flux, "blocks")
    save(lora(flux, blocks, 4, "diffusion_model.{}".format), "loras", "flux_a.safetensors")
    single = [name for name in blocks if "single" in name][:3]
    save(lora(flux, single, 8, "diffusion_model.{}".format), "loras", "flux_b.safetensors")
    unet, control = (filled(weights, torch.float16) for weights in _sd15())
    vae, clip = filled(_vae(), torch.float16), filled(_clip(), torch.float16)
    save(prefixed(control, "control_model."), "controlnet", "cn.safetensors")
    save(vae, "vae", "vae.safetensors")
    save(clip, "text_encoders", "clip_l.safetensors")
    whole = prefixed(unet, "model.diffusion_model.") | prefixed(vae, "first_stage_model.")
    whole |= prefixed(clip, "cond_stage_model.transformer.")
    save(whole, "checkpoints", "sd15.safetensors")
    both = lora(unet, _matrices(unet, "attn"), 4, "diffusion_model.{}".format)
    names = _matrices(clip, "q_proj")
    both |= lora(clip, names, 4, lambda name: "lora_te_" + name.replace(".", "_"))
    save(both, "loras", "sd15.safetensors")


if __name__ == "__main__":
    folder, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    sys.argv = [sys.argv[0], "--cpu"]
    kept = prepare(folder)
    import comfy.options

    comfy.options.enable_args_parsing()
    make(target)
