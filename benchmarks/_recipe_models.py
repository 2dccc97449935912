# SPDX-License-Identifier: Apache-2.0
"""Published models on the meta device: configurations, inputs of one forward, published sizes.

Configurations are those of config.json in the repositories named at each part. What is not written
is the default of the class in diffusers or transformers. `published` has the bytes of the tensors
as the repository's index says ("total_size"), or the bytes of the file, which has a header, too.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from distorch.integrations.empty_models import empty_diffusers_model, empty_transformers_model
from distorch.planner import Inventory, WeightInfo
from distorch.runtime import groups

BF16, FP32 = torch.bfloat16, torch.float32
TEXT = 512  # tokens of a prompt
CONTEXT = 4096  # tokens that a language model reads at once; their keys and values stay
FRAMES = (21, 60, 104)  # latents of 81 frames of 480x832


@dataclass(frozen=True)
class Part:
    """A module of a model. `run` is one forward. `narrow`: how its file has matrices, if not in the
    module's dtype. `published`: bytes and whose; `file_item`: bytes of an element there.
    """

    make: Callable[[], nn.Module]
    run: Callable[[Any], object]
    published: tuple[int, str]
    file_item: int = 2
    narrow: str | None = None
    tile: Callable[[Any], object] | None = None


@dataclass(frozen=True)
class Model:
    """A recipe's subject. `parts`: name in the pipeline -> key of PARTS. `forwards`: of a step part
    in a step. `options` of the placement: patterns by name.
    """

    name: str
    load: str
    parts: Mapping[str, str]
    step_parts: tuple[str, ...]
    forwards: int = 1
    options: Mapping[str, str] = field(default_factory=dict)


def from_diffusers(cls: str, dtype: torch.dtype = BF16, **config: Any) -> Callable[[], nn.Module]:
    """Makes the module that `load_pipeline` would fill."""

    def make() -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            with torch.device("meta"):
                return empty_diffusers_model(getattr(diffusers, cls), Path(folder), dtype)

    return make


def from_transformers(cls: str, config_cls: str, **config: Any) -> Callable[[], nn.Module]:
    """Makes the module that `load_pretrained` would fill, in bfloat16."""

    def make() -> nn.Module:
        made = getattr(transformers, config_cls)(**config)
        with torch.device("meta"):
            return empty_transformers_model(getattr(transformers, cls), made, BF16)

    return make


def some(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def tokens(count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.long)


def run_flux(model: Any) -> object:
    """1024x1024: 4096 tokens of image."""
    return model(
        hidden_states=some(1, 4096, 64), encoder_hidden_states=some(1, TEXT, 4096),
        pooled_projections=some(1, 768), timestep=some(1), guidance=some(1, dtype=FP32),
        img_ids=some(4096, 3), txt_ids=some(TEXT, 3), return_dict=False,
    )  # fmt: skip


def run_qwen_image(model: Any) -> object:
    """1024x1024: 4096 tokens of image."""
    return model(
        hidden_states=some(1, 4096, 64), encoder_hidden_states=some(1, TEXT, 3584),
        timestep=some(1), img_shapes=[[(1, 64, 64)]], return_dict=False,
    )  # fmt: skip


def run_wan(model: Any) -> object:
    """81 frames of 480x832: 32760 tokens."""
    return model(
        hidden_states=some(1, 16, *FRAMES), encoder_hidden_states=some(1, TEXT, 4096),
        timestep=torch.zeros(1, dtype=torch.long), return_dict=False,
    )  # fmt: skip


def decoding(*latents: int, dtype: torch.dtype = BF16) -> Callable[[Any], object]:
    """From latents to pixels."""
    return lambda vae: vae.decode(some(1, 16, *latents, dtype=dtype), return_dict=False)


def run_language(model: Any) -> object:
    """Reads the whole context, as `generate` begins."""
    return model(tokens(CONTEXT), use_cache=True, logits_to_keep=1)


def small_tiles(vae: Any) -> None:
    """FLUX's tiles are 1024 pixels wide: at 1024x1024, `enable_tiling()` alone changes nothing."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64


_T5 = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
_FLUX_VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
    "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_QWEN25_VL = {
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_attention_heads": 32,
          "tie_word_embeddings": False}  # fmt: skip

PARTS = {
    "flux": Part(
        from_diffusers("FluxTransformer2DModel", guidance_embeds=True), run_flux,
        (23802816640, "black-forest-labs/FLUX.1-dev, transformer, index"),
    ),
    "flux vae": Part(
        from_diffusers("AutoencoderKL", **_FLUX_VAE), decoding(128, 128),
        (167666902, "black-forest-labs/FLUX.1-dev, vae, file"), tile=small_tiles,
    ),
    "t5": Part(
        from_transformers("T5EncoderModel", "T5Config", vocab_size=32128, **_T5),
        lambda model: model(tokens(TEXT)),
        (9524621312, "black-forest-labs/FLUX.1-dev, text_encoder_2, index"),
    ),
    "clip": Part(
        from_transformers("CLIPTextModel", "CLIPTextConfig", hidden_size=768,
                          intermediate_size=3072, num_attention_heads=12, projection_dim=768),
        lambda model: model(tokens(77)),
        (246144152, "comfyanonymous/flux_text_encoders, clip_l, file"),
    ),
    "qwen image": Part(
        from_diffusers("QwenImageTransformer2DModel"), run_qwen_image,
        (40860802176, "Qwen/Qwen-Image, transformer, index"),
    ),
    "qwen image vae": Part(
        from_diffusers("AutoencoderKLQwenImage"), decoding(1, 128, 128),
        (253806966, "Qwen/Qwen-Image, vae, file"), tile=lambda vae: vae.enable_tiling(),
    ),
    "qwen2.5-vl": Part(
        from_transformers("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", **_QWEN25_VL),
        # 34 tokens of the pipeline's template. The pipeline asks for all hidden states.
        lambda model: model(input_ids=tokens(TEXT + 34), output_hidden_states=True),
        (16584333312, "Qwen/Qwen-Image, text_encoder, index"),
    ),
    "wan 14b": Part(
        from_diffusers("WanTransformer3DModel"), run_wan,
        (57153966336, "Wan-AI/Wan2.2-T2V-A14B-Diffusers, transformer, index"), file_item=4,
    ),
    "wan 1.3b": Part(
        from_diffusers("WanTransformer3DModel", num_attention_heads=12, ffn_dim=8960,
                       num_layers=30), run_wan,
        (2838303560, "Comfy-Org/Wan_2.1_ComfyUI_repackaged, wan2.1_t2v_1.3B_fp16, file"),
    ),
    "wan vae": Part(
        from_diffusers("AutoencoderKLWan", FP32), decoding(*FRAMES, dtype=FP32),
        (507609880, "Wan-AI/Wan2.1-T2V-1.3B, Wan2.1_VAE.pth, file"), file_item=4,
        tile=lambda vae: vae.enable_tiling(),
    ),
    "umt5": Part(
        from_transformers("UMT5EncoderModel", "UMT5Config", vocab_size=256384, **_T5),
        lambda model: model(tokens(TEXT)),
        (11361820672, "Wan-AI/Wan2.2-T2V-A14B-Diffusers, text_encoder, index"),
    ),
    "qwen3-8b": Part(
        from_transformers("Qwen3ForCausalLM", "Qwen3Config", hidden_size=4096,
                          intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8,
                          **_QWEN3), run_language,
        (16381470720, "Qwen/Qwen3-8B, index"),
    ),
}  # fmt: skip
PARTS["flux Q8_0"] = dataclasses.replace(
    PARTS["flux"], narrow="Q8_0",
    published=(12708281504, "city96/FLUX.1-dev-gguf, flux1-dev-Q8_0.gguf, file"),
)  # fmt: skip
PARTS["qwen image fp8"] = dataclasses.replace(
    PARTS["qwen image"], narrow="fp8",
    published=(20430635136, "Comfy-Org/Qwen-Image_ComfyUI, qwen_image_fp8_e4m3fn, file"),
)  # fmt: skip

_WAN = (
    'load_pipeline("Wan-AI/Wan{}-Diffusers", SPEC, '
    'dtype={{"vae": torch.float32, "default": torch.bfloat16}})'
)
_FLUX = {"vae": "flux vae", "text_encoder": "clip", "text_encoder_2": "t5"}
_QWEN = {"vae": "qwen image vae", "text_encoder": "qwen2.5-vl"}
# The head is the largest weight: resident, it needs no room in the ring. Of the table of tokens
# only rows are fetched.
_LANGUAGE = {"keep": "lm_head.*", "offload": "model.embed_tokens.*"}
MODELS = (
    Model("FLUX.1-dev bf16", 'load_pipeline("black-forest-labs/FLUX.1-dev", SPEC)',
          {"transformer": "flux", **_FLUX}, ("transformer",)),
    Model("FLUX.1-dev Q8_0", 'load_pipeline("black-forest-labs/FLUX.1-dev", SPEC, '
          'files={"transformer": "flux1-dev-Q8_0.gguf"}, dtype=torch.bfloat16)',
          {"transformer": "flux Q8_0", **_FLUX}, ("transformer",)),
    Model("Qwen-Image bf16", 'load_pipeline("Qwen/Qwen-Image", SPEC)',
          {"transformer": "qwen image", **_QWEN}, ("transformer",), 2),
    Model("Qwen-Image fp8", 'load_pipeline("Qwen/Qwen-Image", SPEC, '
          'files={"transformer": "qwen_image_fp8_e4m3fn.safetensors"}, dtype=torch.bfloat16)',
          {"transformer": "qwen image fp8", **_QWEN}, ("transformer",), 2),
    Model("Wan 2.2 T2V A14B bf16", _WAN.format("2.2-T2V-A14B"),
          {"transformer": "wan 14b", "transformer_2": "wan 14b", "vae": "wan vae",
           "text_encoder": "umt5"}, ("transformer", "transformer_2"), 2),
    Model("Wan 2.1 T2V 1.3B bf16", _WAN.format("2.1-T2V-1.3B"),
          {"transformer": "wan 1.3b", "vae": "wan vae", "text_encoder": "umt5"},
          ("transformer",), 2),
    Model("Qwen3-8B bf16", 'load_pretrained("Qwen/Qwen3-8B", SPEC)', {"model": "qwen3-8b"},
          ("model",), options=_LANGUAGE),
)  # fmt: skip

# What city96's file of FLUX has in 16 bits: these names and everything with one dimension.
_WIDE_IN_Q8_0 = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out.")


def inventory_of(module: nn.Module, narrow: str | None) -> Inventory:
    """The module's weights with the bytes that its file has: fp8 has one byte for every element,
    Q8_0 has 34 bytes for 32.
    """
    plain = groups.inventory_of(module, groups.group_members(module))
    return Inventory(tuple(_stored(weight, narrow) for weight in plain.weights))


def _stored(weight: WeightInfo, narrow: str | None) -> WeightInfo:
    if narrow is None or weight.kind != "parameter":
        return weight
    elements = weight.nbytes // 2
    if narrow == "fp8":
        return dataclasses.replace(weight, nbytes=elements)
    if len(weight.shape) < 2 or weight.name.startswith(_WIDE_IN_Q8_0):
        return weight
    return dataclasses.replace(weight, nbytes=elements * 34 // 32)


def published_form(part: Part, module: nn.Module) -> int:
    """Bytes of the parameters as the published file has them."""
    if part.narrow:
        stored = inventory_of(module, part.narrow).weights
        return sum(weight.nbytes for weight in stored if weight.kind == "parameter")
    return sum(p.numel() for p in module.parameters()) * part.file_item
