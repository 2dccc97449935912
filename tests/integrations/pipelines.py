# SPDX-License-Identifier: Apache-2.0
"""What the tests of pipelines share."""

import diffusers
import torch

from tests import tiny_models as tiny

DISK = {"spec": "cpu,0b;disk,*", "min_bytes": 0}
PARTS = ("unet", "vae", "text_encoder")
MAKERS = [tiny.stable_diffusion, tiny.flux, tiny.wan, tiny.qwen_image]


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "a lighthouse", "num_inference_steps": 2, **options}
    with torch.inference_mode():
        out = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **options)
    return out.images if hasattr(out, "images") else out.frames


def small(pipe, **options):
    return draw(pipe, height=16, width=16, **options)


def resident(folder, dtype=torch.bfloat16, **options):
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **options)


def models(pipe):
    return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def assert_same(pipe, reference):
    assert models(pipe).keys() == models(reference).keys()
    for part, wanted in models(reference).items():
        ours = getattr(pipe, part).state_dict()
        assert ours.keys() == wanted.state_dict().keys()
        for name, value in wanted.state_dict().items():
            assert ours[name].dtype == value.dtype, (part, name)
            assert torch.equal(ours[name], value), (part, name)


def original_names(pipe):
    """A Stable Diffusion pipeline of two levels in the names of the original checkpoint."""
    found = {}
    for name, value in pipe.text_encoder.state_dict().items():
        short = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{short}"] = value
    for name, value in pipe.vae.state_dict().items():
        old_name = name
        for new, old in (
            ("encoder.down_blocks.0.downsamplers.0", "encoder.down.0.downsample"),
            ("decoder.up_blocks.0.upsamplers.0", "decoder.up.1.upsample"),
            ("encoder.down_blocks.0.resnets", "encoder.down.0.block"),
            ("encoder.down_blocks.1.resnets", "encoder.down.1.block"),
            ("decoder.up_blocks.0.resnets", "decoder.up.1.block"),
            ("decoder.up_blocks.1.resnets", "decoder.up.0.block"),
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
            ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
            ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
        ):  # fmt: skip
            old_name = old_name.replace(new, old)
        attention = "attn_1" in old_name and value.dim() == 2
        found[f"first_stage_model.{old_name}"] = value[..., None, None] if attention else value
    for name, value in pipe.unet.state_dict().items():
        found[f"model.diffusion_model.{original_of_unet(name)}"] = value
    return {name: value.contiguous() for name, value in found.items()}


def original_of_unet(name):
    for new, old in (
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("down_blocks.0.resnets.0", "input_blocks.1.0"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("down_blocks.1.resnets.0", "input_blocks.3.0"),
        ("down_blocks.1.attentions.0", "input_blocks.3.1"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
        ("up_blocks.0.resnets.0", "output_blocks.0.0"),
        ("up_blocks.0.attentions.0", "output_blocks.0.1"),
        ("up_blocks.0.resnets.1", "output_blocks.1.0"),
        ("up_blocks.0.attentions.1", "output_blocks.1.1"),
        ("up_blocks.0.upsamplers.0", "output_blocks.1.2"),
        ("up_blocks.1.resnets.0", "output_blocks.2.0"),
        ("up_blocks.1.resnets.1", "output_blocks.3.0"),
    ):  # fmt: skip
        if name.startswith(f"{new}."):
            name = name.replace(new, old, 1)
    if "blocks." in name or "middle_block." in name:
        for new, old in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"),
                         ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
                         ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")):  # fmt: skip
            if "transformer_blocks" not in name:
                name = name.replace(f".{new}.", f".{old}.")
    return name


def loras(pipe):
    """A kohya file for the U-Net and the text encoder; and where its changes are."""
    torch.manual_seed(1)
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    text = next(n for n, _ in pipe.text_encoder.named_modules() if n.endswith("layers.0.mlp.fc1"))
    found = {}
    for prefix, part, name in (
        ("lora_unet", pipe.unet, unet),
        ("lora_te", pipe.text_encoder, text),
    ):
        rows, columns = part.get_submodule(name).weight.shape
        stem = f"{prefix}_{name}".replace(".", "_")
        found[f"{stem}.lora_down.weight"] = torch.randn(2, columns)
        found[f"{stem}.lora_up.weight"] = torch.randn(rows, 2)
    return found, {"unet": f"{unet}.weight", "text_encoder": f"{text}.weight"}
