# SPDX-License-Identifier: Apache-2.0
"""What diffusers' converters know, as tables: an author's name -> the diffusers weights that it becomes.

"a b c": rows one after the other; "~a": its two halves of rows change places. From a table come a LoRA
in the converter's own spelling, and the change of each weight, by hand (up @ down * alpha / rank).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from tests.lora.converters.models import FACTORIES

PEFT, KOHYA = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
XLABS, DEFAULT = (
    (".down.weight", ".up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def blocks(source, target, pairs, count=2):
    """The pairs below {source}.i and {target}.i."""
    return {
        f"{source.format(i)}.{stem}": " ".join(
            ("~" if t[0] == "~" else "") + f"{target.format(i)}.{t.lstrip('~')}"
            for t in targets.split()
        )
        for i in range(count)
        for stem, targets in pairs.items()
    }


def same(model, pattern):
    """Layers of the model that keep their names."""
    return {name: name for name in layers(model) if re.search(pattern, name)}


_layers = {}


def layers(model):
    """Name -> shape of the weight, of each layer that a LoRA goes on."""
    if model not in _layers:
        module = build(model)
        _layers[model] = {
            k: tuple(m.weight.shape)
            for k, m in module.named_modules()
            if isinstance(m, LEAVES) and getattr(m, "groups", 1) == 1
        }
    return _layers[model]


def build(model, seed=0):
    torch.manual_seed(seed)
    return FACTORIES[model]()


QKV, ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"


def flux(modulation=True):
    double = {
        "img_attn.qkv": QKV,
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_attn.qkv": ADDED,
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    }
    single = {"linear1": f"{QKV} proj_mlp", "linear2": "proj_out"}
    top = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    if modulation:
        double |= {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}
        single |= {"modulation.lin": "norm.linear"}
        for stem, name in {
            "time_in": "timestep_embedder",
            "vector_in": "text_embedder",
            "guidance_in": "guidance_embedder",
        }.items():
            top |= {
                f"{stem}.in_layer": f"time_text_embed.{name}.linear_1",
                f"{stem}.out_layer": f"time_text_embed.{name}.linear_2",
            }
        top["final_layer.adaLN_modulation.1"] = "~norm_out.linear"
    return (
        blocks("double_blocks.{}", "transformer_blocks.{}", double)
        | blocks("single_blocks.{}", "single_transformer_blocks.{}", single)
        | top
    )


def kontext():
    """fal's: no embedders, no final modulation."""
    return {
        k: v for k, v in flux().items() if k.startswith(("double", "single", "final_layer.linear"))
    }


def chroma_original():
    guidance = {"in_proj": "in_proj", "out_proj": "out_proj"}
    for i in range(2):
        guidance |= {
            f"layers.{i}.in_layer": f"layers.{i}.linear_1",
            f"layers.{i}.out_layer": f"layers.{i}.linear_2",
        }
    return flux(False) | {
        f"distilled_guidance_layer.{k}": f"distilled_guidance_layer.{v}"
        for k, v in guidance.items()
    }


XLABS_DOUBLE = {
    "processor.qkv_lora1": QKV,
    "processor.proj_lora1": "attn.to_out.0",
    "processor.qkv_lora2": ADDED,
    "processor.proj_lora2": "attn.to_add_out",
}
XLABS_TABLE = blocks("double_blocks.{}", "transformer_blocks.{}", XLABS_DOUBLE) | blocks(
    "single_blocks.{}",
    "single_transformer_blocks.{}",
    {"processor.qkv_lora": QKV, "processor.proj_lora": "proj_out"},
)

FLUX2_DOUBLE = {
    "img_attn.qkv": QKV,
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.qkv": ADDED,
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
FLUX2 = blocks("double_blocks.{}", "transformer_blocks.{}", FLUX2_DOUBLE) | blocks(
    "single_blocks.{}",
    "single_transformer_blocks.{}",
    {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
)
FLUX2_FEW = FLUX2 | {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
# The halves change places as in diffusers' conversion of the checkpoint (single_file_utils); its conversion of LoRAs forgets it.
FLUX2_ALL = FLUX2_FEW | {
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
    **{
        f"{s}.lin": f"{s}.linear"
        for s in (
            "single_stream_modulation",
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
        )
    },
}

FLUX3_BLOCK = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}


def flux3():
    return (
        blocks("content_mode_blocks.image.{}", "mode_blocks.image.{}", FLUX3_BLOCK)
        | blocks("content_mode_blocks.image_cond.{}", "mode_blocks.image_cond.{}", FLUX3_BLOCK)
        | blocks("txt_mode_blocks.{}", "txt_mode_blocks.{}", FLUX3_BLOCK)
        | blocks("single_blocks.{}", "single_transformer_blocks.{}", FLUX3_BLOCK)
        | same("flux3", r"modulations|embedder|norm_out|proj_out")
    )


def wan(image=True, top=True):
    block = {
        **{
            f"self_attn.{o}": f"attn1.{c}"
            for o, c in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
        },
        **{
            f"cross_attn.{o}": f"attn2.{c}"
            for o, c in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
        },
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    }
    if image:
        block |= {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}
    found = blocks("blocks.{}", "blocks.{}", block)
    if top:
        found |= {"time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out"}
        for name, n in (("text_embedding", "text_embedder"), ("time_embedding", "time_embedder")):
            found |= {
                f"{name}.0": f"condition_embedder.{n}.linear_1",
                f"{name}.2": f"condition_embedder.{n}.linear_2",
            }
        if image:
            found |= {
                "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
                "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            }
    return found


def hunyuan():
    double = {
        "img_attn_qkv": QKV,
        "img_attn_proj": "attn.to_out.0",
        "img_mlp.fc1": "ff.net.0.proj",
        "img_mlp.fc2": "ff.net.2",
        "img_mod.linear": "norm1.linear",
        "txt_attn_qkv": ADDED,
        "txt_attn_proj": "attn.to_add_out",
        "txt_mlp.fc1": "ff_context.net.0.proj",
        "txt_mlp.fc2": "ff_context.net.2",
        "txt_mod.linear": "norm1_context.linear",
    }
    refiner = {
        "self_attn_qkv": QKV,
        "self_attn_proj": "attn.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm_out.linear",
    }
    return (
        blocks("double_blocks.{}", "transformer_blocks.{}", double)
        | blocks(
            "single_blocks.{}",
            "single_transformer_blocks.{}",
            {
                "linear1": f"{QKV} proj_mlp",
                "linear2": "proj_out",
                "modulation.linear": "norm.linear",
            },
        )
        | blocks(
            "txt_in.individual_token_refiner.blocks.{}",
            "context_embedder.token_refiner.refiner_blocks.{}",
            refiner,
        )
        | {
            "img_in.proj": "x_embedder.proj",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
            "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
            "txt_in.input_embedder": "context_embedder.proj_in",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "~norm_out.linear",
        }
    )


def lumina2():
    block = {
        "attention.qkv": QKV,
        "attention.out": "attn.to_out.0",
        **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)},
    }
    modulated = block | {"adaLN_modulation.1": "norm1.linear"}
    return (
        blocks("layers.{}", "layers.{}", modulated)
        | blocks("noise_refiner.{}", "noise_refiner.{}", modulated, 1)
        | blocks("context_refiner.{}", "context_refiner.{}", block, 1)
    )


def renamed(model, *rules):
    """Original name -> layer, by replacing in the layers' names."""
    found = {}
    for name in layers(model):
        original = name
        for pattern, new in rules:
            original = re.sub(pattern, new, original)
        found[original] = name
    return found


def ltx2():
    return renamed(
        "ltx2",
        (r"^audio_proj_in", "audio_patchify_proj"),
        (r"^proj_in", "patchify_proj"),
        (r"^audio_time_embed", "audio_adaln_single"),
        (r"^time_embed", "adaln_single"),
        (r"^av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
        (r"^av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
        (r"^av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
        (r"^av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
    )


ZQKV = "attention.to_q attention.to_k attention.to_v"


def z_image_fused():
    """musubi-tuner's and ComfyUI's: the released module tree."""
    found = {}
    for stem, count in (("layers", 2), ("noise_refiner", 1), ("context_refiner", 1)):
        pairs = {
            "attention.qkv": ZQKV,
            "attention.out": "attention.to_out.0",
            **{f"feed_forward.w{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
        }
        if stem != "context_refiner":
            pairs["adaLN_modulation.0"] = "adaLN_modulation.0"
        found |= blocks(f"{stem}.{{}}", f"{stem}.{{}}", pairs, count)
    return found | {n: n for n in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")}


def z_image_released():
    """The names of the released checkpoint itself."""
    return z_image_fused() | {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }


IDEOGRAM = blocks(
    "layers.{}",
    "layers.{}",
    {
        "attention.qkv": ZQKV,
        "attention.o": "attention.to_out.0",
        **{
            n: n
            for n in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaln_modulation")
        },
    },
)


def krea2():
    block = {
        f"attn.{o}": f"attn.{c}"
        for o, c in {
            "wq": "to_q",
            "wk": "to_k",
            "wv": "to_v",
            "wo": "to_out.0",
            "gate": "to_gate",
        }.items()
    } | {f"mlp.{n}": f"ff.{n}" for n in ("gate", "up", "down")}
    return (
        blocks("blocks.{}", "transformer_blocks.{}", block)
        | blocks("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}", block, 1)
        | blocks("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}", block, 1)
        | {
            "first": "img_in",
            "last.linear": "final_layer.linear",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "txtfusion.projector": "text_fusion.projector",
        }
    )


def ace_step():
    attention = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
    block = {
        f"{a}.{o}": f"{a}.{c}" for a in ("self_attn", "cross_attn") for o, c in attention.items()
    } | {f"mlp.{n}": f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
    return blocks("layers.{}", "layers.{}", block)


def anima():
    block = {
        f"adaln_modulation_{n}.{i}": f"norm{k}.linear_{i}"
        for k, n in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for i in (1, 2)
    }
    for k, a in enumerate(("self_attn", "cross_attn"), 1):
        block |= {
            f"{a}.{o}": f"attn{k}.{c}"
            for o, c in {
                "q_proj": "to_q",
                "k_proj": "to_k",
                "v_proj": "to_v",
                "output_proj": "to_out.0",
            }.items()
        }
    block |= {"mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2"}
    return blocks("blocks.{}", "transformer_blocks.{}", block) | {
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "x_embedder.proj.1": "patch_embed.proj",
    }


def minimax_h3():
    block = {
        "attn.qkv_proj": QKV,
        "attn.out_proj": "attn.to_out.0",
        "mlp.fc1": "~ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    refiner = blocks("token_refiner.blocks.{}", "token_refiner.refiner_blocks.{}", block)
    block["adaln_proj.linear"] = "adaln_proj.linear"
    return blocks("blocks.{}", "transformer_blocks.{}", block) | refiner | {
        "video_patch_proj": "proj_in",
        "audio_patch_proj": "audio_proj_in",
        "condition_proj": "context_embedder",
        "time_embedder.proj_in": "time_embedder.linear_1",
        "time_embedder.proj_out": "time_embedder.linear_2",
        "final_layer.adaln_proj.linear": "norm_out.linear",
        "final_layer.video_out": "proj_out",
        "final_layer.audio_out": "audio_proj_out",
    }  # fmt: skip


class Recipe(NamedTuple):
    """One spelling: the converter that reads it, a model, its table, and what is round its names.

    `sizes` in the converter's source that have to be replaced; `own`: its names are also those of a
    module of its authors. No converter: the table alone says what is right.
    """

    converter: str
    model: str
    table: Callable[[], dict[str, str]]
    prefix: str = "diffusion_model."
    ends: tuple[str, str] = PEFT
    sizes: dict[str, str] = {}
    own: bool = False


FLUX_SIZES = {
    "range(19)": "range(2)", "range(38)": "range(2)",
    "[3072, 3072, 3072, 12288]": "[16, 16, 16, 64]",
}  # fmt: skip
FAL_SIZES = {
    "num_layers = 19": "num_layers = 2", "num_single_layers = 38": "num_single_layers = 2",
    "inner_dim = 3072": "inner_dim = 16",
}  # fmt: skip
HUNYUAN_SIZES = {"hidden_size = 3072": "hidden_size = 16"}
LUMINA_SIZES = {"[2304, 768, 768]": "[32, 16, 16]"}
RECIPES = {
    "flux, kohya": Recipe("kohya_flux", "flux", flux, "lora_unet_", KOHYA, FLUX_SIZES, True),
    "flux, kohya with dots": Recipe("kohya_flux", "flux", flux, ends=KOHYA, sizes=FLUX_SIZES),
    "flux, of a mixture": Recipe(
        "kohya_flux", "flux", lambda: same("flux", r"attn\.|^(context|norm_out|proj_out|x_emb|time_)"),
        "lora_transformer_", KOHYA,
    ),
    "flux, xlabs": Recipe("xlabs_flux", "flux", lambda: XLABS_TABLE, "", XLABS),
    "flux, kontext": Recipe("fal_kontext", "flux", kontext, "base_model.model.", sizes=FAL_SIZES),
    "chroma": Recipe("kohya_flux", "chroma", lambda: flux(False), "lora_unet_", KOHYA, FLUX_SIZES),
    "chroma, its authors": Recipe("", "chroma", chroma_original, own=True),
    "flux2": Recipe("non_diffusers_flux2", "flux2", lambda: FLUX2_ALL, own=True),
    "flux2, kohya": Recipe("kohya_flux2", "flux2", lambda: FLUX2_FEW, "lora_unet_", KOHYA),
    "flux3": Recipe("non_diffusers_flux3", "flux3", flux3, own=True),
    "hunyuan_video": Recipe("hunyuan_video", "hunyuan_video", hunyuan, sizes=HUNYUAN_SIZES, own=True),
    "lumina2": Recipe("non_diffusers_lumina2", "lumina2", lumina2, sizes=LUMINA_SIZES, own=True),
    "wan": Recipe("non_diffusers_wan", "wan", wan, own=True),
    "wan, musubi": Recipe("musubi_wan", "wan", lambda: wan(top=False), "lora_unet_", KOHYA),
    "skyreels": Recipe("non_diffusers_wan", "skyreels", wan),
    "helios": Recipe("non_diffusers_wan", "helios", lambda: wan(False)),
    "hidream": Recipe("non_diffusers_hidream", "hidream", lambda: same("hidream", ".")),
    "ltxv": Recipe("non_diffusers_ltxv", "ltx", lambda: same("ltx", ".")),
    "ltxv, its authors": Recipe(
        "", "ltx", lambda: renamed("ltx", ("^proj_in", "patchify_proj"), ("^time_embed", "adaln_single")),
        own=True,
    ),
    "ltx2": Recipe("non_diffusers_ltx2", "ltx2", ltx2, own=True),
    "ltx2, connectors": Recipe(
        "", "ltx2_connectors", lambda: {"text_embedding_projection.aggregate_embed": "text_proj_in"}, ""
    ),
    "qwen": Recipe("non_diffusers_qwen", "qwen", lambda: same("qwen", "."), "lora_unet_", KOHYA),
    "qwen, default": Recipe("non_diffusers_qwen", "qwen", lambda: same("qwen", "."), "", DEFAULT),
    "z_image": Recipe(
        "non_diffusers_z_image", "z_image", z_image_fused, "lora_unet_", KOHYA, own=True
    ),
    "z_image, separate": Recipe(
        "non_diffusers_z_image", "z_image", lambda: same("z_image", "."), "lora_unet_", KOHYA
    ),
    "z_image, its authors": Recipe("", "z_image", z_image_released, own=True),
    "ideogram4": Recipe("non_diffusers_ideogram4", "ideogram4", lambda: IDEOGRAM, own=True),
    "ideogram4, conditional": Recipe(
        "non_diffusers_ideogram4", "ideogram4", lambda: IDEOGRAM, "conditional_transformer.", KOHYA
    ),
    "krea2": Recipe("non_diffusers_krea2", "krea2", krea2, own=True),
    "ace_step": Recipe("non_diffusers_ace_step", "ace_step", ace_step, "base_model.model.", own=True),
    "minimax_h3": Recipe("non_diffusers_minimax_h3", "minimax_h3", minimax_h3, own=True),
    "minimax_h3, bare": Recipe("non_diffusers_minimax_h3", "minimax_h3", minimax_h3, ""),
    "minimax_h3, musubi": Recipe(
        "non_diffusers_minimax_h3", "minimax_h3", minimax_h3, "lora_unet_", KOHYA
    ),
    "anima": Recipe("non_diffusers_anima", "anima", anima, own=True),
    "anima, llm_adapter": Recipe(
        "non_diffusers_anima", "anima_text", lambda: {f"llm_adapter.{k}": k for k in layers("anima_text")}
    ),
}  # fmt: skip


def shape_of(model, targets):
    shapes = [layers(model)[target.lstrip("~")] for target in targets.split()]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def swapped(rows):
    return torch.cat(rows.chunk(2)[::-1])


class Change:
    """Factors of rank 2 for each name of a table: how they are written, and what is to come."""

    def __init__(self, shapes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.pairs = {
            name: (torch.randn(2, *shape[1:], generator=generator),
                   torch.randn(shape[0], 2, *(1 for _ in shape[2:]), generator=generator))
            for name, shape in shapes.items()
        }  # fmt: skip

    def state(self, prefix, ends):
        """The file; kohya's files have alphas: of the rank, so that they change nothing."""
        state = {}
        for name, (down, up) in self.pairs.items():
            stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
            state |= {stem + ends[0]: down.clone(), stem + ends[1]: up.clone()}
            if ends is KOHYA:
                state[f"{stem}.alpha"] = torch.tensor(2.0)
        return state

    def delta(self, name):
        down, up = self.pairs[name]
        return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
