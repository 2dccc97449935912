"""Checkpoints in the names of their makers fill diffusers' and transformers' modules."""

import types

import gguf
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLTextConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import distorch
from distorch import FormatError, _ops
from distorch.formats.checkpoint import open_checkpoint
from distorch.formats.naming import fit_names
from distorch.formats.naming.tracing import trace
from distorch.formats.safetensors import StoredTensor

SPECS = ["cpu,*", "cpu,0b;disk,*"]
Q = gguf.GGMLQuantizationType


def small(cls, config, seed=0):
    torch.manual_seed(seed)
    model = cls(**config) if isinstance(config, dict) else cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def empty(cls, config):
    with init_empty_weights(include_buffers=False):
        return (cls(**config) if isinstance(config, dict) else cls(config)).eval()


# --- diffusers: the original names, the other way round than diffusers converts them ---

FLUX = {
    "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
}  # fmt: skip
_FLUX_TOP = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear",
}  # fmt: skip
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}  # fmt: skip
_FLUX_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip


def flux_original(weights):
    out = {}
    for ending in ("weight", "bias"):
        for ours, theirs in _FLUX_TOP.items():
            out[f"{theirs}.{ending}"] = weights[f"{ours}.{ending}"]
        scale, shift = weights[f"norm_out.linear.{ending}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{ending}"] = torch.cat([shift, scale])
        ours, theirs = "transformer_blocks.0", "double_blocks.0"
        for a, b in _FLUX_DOUBLE.items():
            out[f"{theirs}.{b}.{ending}"] = weights[f"{ours}.{a}.{ending}"]
        for fused, parts in _FLUX_FUSED.items():
            out[f"{theirs}.{fused}.{ending}"] = torch.cat(
                [weights[f"{ours}.{part}.{ending}"] for part in parts]
            )
        for i in range(2):
            ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out[f"{theirs}.linear1.{ending}"] = torch.cat(
                [weights[f"{ours}.{part}.{ending}"] for part in parts]
            )
            out[f"{theirs}.linear2.{ending}"] = weights[f"{ours}.proj_out.{ending}"]
            out[f"{theirs}.modulation.lin.{ending}"] = weights[f"{ours}.norm.linear.{ending}"]
    for a, b in _FLUX_NORMS.items():
        out[f"double_blocks.0.{b}.scale"] = weights[f"transformer_blocks.0.{a}.weight"]
    for i in range(2):
        for a, b in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            name = f"single_transformer_blocks.{i}.attn.{a}.weight"
            out[f"single_blocks.{i}.norm.{b}.scale"] = weights[name]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _with_constants(code, changed):
    """Compiled code with other numbers in it, in its inner functions too."""

    def new(value):
        if isinstance(value, types.CodeType):
            return _with_constants(value, changed)
        return changed.get(value, value) if type(value) is int else value

    return code.replace(co_consts=tuple(new(value) for value in code.co_consts))


@pytest.fixture
def flux_of_width_64(monkeypatch):
    """diffusers' conversion has the released models' width written in it."""
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    function = entry["checkpoint_mapping_fn"]
    code = _with_constants(function.__code__, {3072: 64})
    small_one = types.FunctionType(code, function.__globals__)
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", small_one)


def flux_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 6, 8), "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
        "guidance": torch.tensor([3.5]),
    }  # fmt: skip


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32, "num_layers": 2,
    "cross_attn_norm": True,
}  # fmt: skip
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "attn2": "cross_attn",
    "attn1": "self_attn", ".to_out.0.": ".o.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.",
    "proj_out": "head.head", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    ".norm2.": ".norm3.",
}  # fmt: skip


def renamed(name, replacements):
    for ours, theirs in replacements.items():
        name = name.replace(ours, theirs)
    return name


def wan_original(weights):
    out = {}
    for ours, tensor in weights.items():
        name = "head.modulation" if ours == "scale_shift_table" else ours
        out[renamed(name.replace("scale_shift_table", "modulation"), _WAN)] = tensor
    return out


def wan_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 1, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
    }  # fmt: skip


LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12,
    "cross_attention_dim": 24, "num_layers": 2, "caption_channels": 16,
}  # fmt: skip


def ltx_original(weights):
    renames = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm",
               "norm_k": "k_norm"}  # fmt: skip
    return {renamed(name, renames): tensor for name, tensor in weights.items()}


def ltx_inputs():
    torch.manual_seed(7)
    return {
        "hidden_states": torch.randn(1, 4, 8), "encoder_hidden_states": torch.randn(1, 3, 16),
        "timestep": torch.tensor([500]), "encoder_attention_mask": torch.ones(1, 3),
        "num_frames": 1, "height": 2, "width": 2,
    }  # fmt: skip


Z_IMAGE = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
    "axes_dims": (4, 6, 6), "axes_lens": (128, 32, 32),
}  # fmt: skip

_Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
    "to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm",
}  # fmt: skip


def z_image_original(weights):
    out = {}
    for name, tensor in weights.items():
        if ".attention.to_q." in name:
            parts = [weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            out[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            out[renamed(name, _Z_IMAGE)] = tensor
    return out


def z_image_inputs():
    torch.manual_seed(7)
    return {"x": [torch.randn(4, 1, 4, 4)], "t": torch.tensor([0.5]),
            "cap_feats": [torch.randn(3, 16)]}  # fmt: skip


ORIGINALS = {
    "flux": (FluxTransformer2DModel, FLUX, flux_original, flux_inputs),
    "wan": (WanTransformer3DModel, WAN, wan_original, wan_inputs),
    "ltx": (LTXVideoTransformer3DModel, LTX, ltx_original, ltx_inputs),
    "z_image": (ZImageTransformer2DModel, Z_IMAGE, z_image_original, z_image_inputs),
}


def same_weights(module, wanted):
    found = module.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def outputs(module, inputs):
    with torch.no_grad():
        out = module(**inputs, return_dict=False)[0]
    return out[0] if isinstance(out, list) else out


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("kind", ORIGINALS)
def test_original_names_fill_a_diffusers_module(tmp_path, flux_of_width_64, kind, prefix, spec):
    cls, config, original, inputs = ORIGINALS[kind]
    model = small(cls, config)
    stored = {prefix + k: v for k, v in original(model.state_dict()).items()}
    save_file(stored, tmp_path / "m.safetensors")
    loaded = distorch.load(empty(cls, config), tmp_path / "m.safetensors", spec, min_bytes=0)
    same_weights(loaded, model.state_dict())
    assert torch.equal(outputs(loaded, inputs()), outputs(model, inputs()))


def test_a_torch_file_in_original_names(tmp_path, flux_of_width_64):
    model = small(FluxTransformer2DModel, FLUX)
    for name, new in (("new.pt", True), ("old.pt", False)):
        torch.save(flux_original(model.state_dict()), tmp_path / name,
                   _use_new_zipfile_serialization=new)  # fmt: skip
        loaded = distorch.load(
            empty(FluxTransformer2DModel, FLUX), tmp_path / name, "cpu,0b;disk,*", min_bytes=0
        )
        same_weights(loaded, model.state_dict())


def test_split_rows_stay_in_the_file_and_swapped_ones_do_not(tmp_path, flux_of_width_64):
    model = small(FluxTransformer2DModel, FLUX)
    file = tmp_path / "m.safetensors"
    save_file(flux_original(model.state_dict()), file)
    checkpoint = open_checkpoint(file)
    fitted = fit_names(checkpoint, empty(FluxTransformer2DModel, FLUX)).tensors
    fused = checkpoint.tensors["double_blocks.0.img_attn.qkv.weight"]
    key = fitted["transformer_blocks.0.attn.to_k.weight"]
    assert key.in_one_range
    assert (key.offset, key.nbytes) == (fused.offset + fused.nbytes // 3, fused.nbytes // 3)
    pieces = {name for name, stored in fitted.items() if not stored.in_one_range}
    assert pieces == {"norm_out.linear.weight", "norm_out.linear.bias"}
    swapped = fitted["norm_out.linear.weight"]
    half = swapped.nbytes // 2
    assert [(p.begin, p.nbytes) for p in swapped.pieces] == [(half, half), (0, half)]


def test_loras_come_off_split_and_swapped_weights(tmp_path, flux_of_width_64):
    model = small(FluxTransformer2DModel, FLUX)
    file = tmp_path / "m.safetensors"
    save_file(flux_original(model.state_dict()), file)
    lora = {}
    for name, columns, rows in (("norm_out.linear", 64, 128), ("context_embedder", 32, 64)):
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns)
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2)
    loaded = distorch.load(
        empty(FluxTransformer2DModel, FLUX), file, "cpu,0b;disk,*", min_bytes=0, loras=[(lora, 1.0)]
    )
    assert not torch.equal(loaded.norm_out.linear.weight, model.norm_out.linear.weight)
    distorch.set_loras(loaded, [])
    same_weights(loaded, model.state_dict())


def test_scales_go_with_the_parts(tmp_path, flux_of_width_64):
    model = small(FluxTransformer2DModel, FLUX)
    stored = flux_original(model.state_dict())
    qkv = stored["double_blocks.0.img_attn.qkv.weight"]
    narrow = (qkv * 100).to(torch.float8_e4m3fn)
    by_row = torch.arange(1.0, 193.0).reshape(192, 1) / 7
    stored["double_blocks.0.img_attn.qkv.weight"] = narrow
    stored["double_blocks.0.img_attn.qkv.scale_weight"] = by_row
    linear2 = (stored["single_blocks.0.linear2.weight"] * 100).to(torch.float8_e4m3fn)
    stored["single_blocks.0.linear2.weight"] = linear2
    stored["single_blocks.0.linear2.scale_weight"] = torch.tensor(0.25)
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(stored, tmp_path / "m.safetensors")
    loaded = distorch.load(
        empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*", min_bytes=0
    )
    wanted = narrow.float() * by_row
    attention = loaded.transformer_blocks[0].attn
    assert torch.equal(attention.to_k.weight + 0, wanted[64:128])
    assert torch.equal(attention.to_v.weight + 0, wanted[128:])
    proj = loaded.single_transformer_blocks[0].proj_out.weight
    assert torch.equal(proj + 0, linear2.float() * 0.25)


# --- what cannot be had by moving rows ---


def stored_matrix(name="w", shape=(6, 4), dtype=torch.float32, block_type=None, nbytes=None):
    nbytes = nbytes or dtype.itemsize * shape[0] * shape[1]
    return StoredTensor(name, "/f", 100, nbytes, dtype, shape, block_type=block_type)


@pytest.mark.parametrize(
    ("change", "named"),
    [(lambda w: w * 2, "'w'.*mul"), (lambda w: w - 1, "'w'.*sub"),
     (lambda w: w.half(), "'w'.*_to_copy"), (lambda w: w.exp_(), "'w'.*exp_"),
     (lambda w: torch.cat([w, w], dim=1), "'w'.*cat"), (lambda w: torch.ones(3), "ones"),
     (lambda w: 3, "'new'.*int")],
)  # fmt: skip
def test_arithmetic_is_refused_by_name(change, named):
    with pytest.raises(FormatError, match=named):
        trace({"w": stored_matrix()}, lambda tensors: {"new": change(tensors["w"])})


def test_big_transposes_and_cut_blocks_are_refused():
    big = {"w": stored_matrix(shape=(1024, 1024))}
    with pytest.raises(FormatError, match="'w'.*transposes"):
        trace(big, lambda tensors: {"new": tensors["w"].T})
    blocks = {"w": stored_matrix(shape=(2, 64), dtype=torch.uint8, block_type="Q8_0", nbytes=136)}
    with pytest.raises(FormatError, match="'w' .Q8_0.*blocks of 32"):
        trace(blocks, lambda tensors: {"new": tensors["w"].reshape(8, 16)[1:2]})
    mixed = {"w": stored_matrix(), "v": stored_matrix("v", dtype=torch.float16)}
    with pytest.raises(FormatError, match="expected one dtype"):
        trace(mixed, lambda t: {"new": torch.cat([t["w"], t["v"].reshape(6, 4)]).clone()})


def test_views_are_followed_as_torch_makes_them(tmp_path):
    weight = torch.arange(48.0).reshape(12, 4)
    save_file({"w": weight}, tmp_path / "m.safetensors")
    tensors = open_checkpoint(tmp_path / "m.safetensors").tensors

    def convert(t):
        (w,) = t.values()
        heads = w.reshape(2, 3, 2, 4).swapaxes(2, 1)
        return {
            "heads": heads.reshape(12, 4), "again": heads.reshape(12, 4)[3:7],
            "columns": w[:, 1:3], "joined": torch.cat([w[6:], w[:6]])[2:9],
            "turned": w.T, "turned copy": w.T.clone(), "one": w[3, 2], "repeated": w[:1].expand(3, 4),
        }  # fmt: skip

    found, left = trace(tensors, convert)
    assert left == []
    for name, value in convert({"w": weight}).items():
        assert torch.equal(found[name].stored.read(), value), name


def test_a_file_that_does_not_fit_is_left_to_loads_own_error(tmp_path):
    save_file({"something.weight": torch.zeros(3, 3)}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"missing \(.*1 unexpected \(something.weight\)"):
        distorch.load(empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*")


def test_a_weight_that_no_name_takes_is_reported(tmp_path, flux_of_width_64):
    stored = flux_original(small(FluxTransformer2DModel, FLUX).state_dict())
    stored["double_blocks.0.surplus.weight"] = torch.zeros(3)
    stored["vae.decoder.weight"] = torch.zeros(3)  # another model of the same file
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="0 missing .*1 unexpected .double_blocks.0.surplus"):
        distorch.load(empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*")


def test_names_that_fit_are_left_alone(tmp_path):
    model = small(WanTransformer3DModel, WAN)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert fit_names(checkpoint, model) is checkpoint
    assert fit_names(checkpoint, nn.Linear(2, 2)) is checkpoint


def test_the_released_width_is_said_when_a_conversion_wants_it(tmp_path):
    stored = flux_original(small(FluxTransformer2DModel, FLUX).state_dict())
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match=r"shapes .* are not those that its conversion expects"):
        distorch.load(empty(FluxTransformer2DModel, FLUX), tmp_path / "m.safetensors", "cpu,*")


# --- GGUF: llama.cpp's names for transformers, original ones for diffusers ---

LM = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
T5 = {
    "vocab_size": 40, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
MODELS = {
    "llama": ("llama", LlamaForCausalLM, LlamaConfig(**LM)),
    "mistral": ("llama", MistralModel, MistralConfig(**LM)),
    "qwen2": ("qwen2", Qwen2ForCausalLM, Qwen2Config(**LM)),
    "qwen2vl": ("qwen2vl", Qwen2VLTextModel, Qwen2VLTextConfig(**LM, rope_parameters=ROPE)),
    "qwen2.5vl": ("qwen2vl", Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig(**LM, rope_parameters=ROPE)),
    "t5encoder": ("t5encoder", T5EncoderModel, T5Config(**T5)),
    "t5": ("t5", T5EncoderModel, T5Config(**T5)),
    "gemma3": ("gemma3", Gemma3ForCausalLM, Gemma3TextConfig(**LM, head_dim=16)),
}  # fmt: skip
IN_TRANSFORMERS = ("llama", "qwen2", "t5encoder", "t5", "gemma3")


def permuted(weight, heads):
    """As llama.cpp's converter stores q and k: the two halves of a head's rows alternate."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, arch, tensors, kind, config=None):
    """`tensors` by their names in the file; matrices as `kind` where its blocks fit."""
    writer = gguf.GGUFWriter(path, arch)
    if config is not None:
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    for name, tensor in tensors.items():
        fits = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        data = tensor.numpy()
        if not fits and tensor.dim() > 1:
            writer.add_tensor(name, data.astype(np.float16))
        elif not fits:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def after_storing(tensor, kind):
    """The values that such a file has for it."""
    if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
        blocks = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    return tensor if tensor.dim() == 1 else tensor.half().float()


def values(stored):
    data = stored.read()
    if stored.block_type is not None:
        data = _ops.dequantise(data, stored.block_type, torch.float32)
    return data.reshape(stored.shape).float()


def llama_cpp_tensors(model, arch, config):
    """The model's weights as llama.cpp's converter writes them."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        weight = parameter.detach()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            query = "q_proj" in name
            heads = config.num_attention_heads if query else config.num_key_value_heads
            weight = permuted(weight, heads)
        elif arch == "gemma3" and "norm" in name:
            weight = weight + 1
        found[f"{known.get_name(stem)}.{ending}"] = weight.contiguous()
    return found


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
@pytest.mark.parametrize("which", MODELS)
def test_llama_cpp_names_fill_a_transformers_module(tmp_path, which, kind):
    arch, cls, config = MODELS[which]
    model, file = small(cls, config), tmp_path / "m.gguf"
    tensors = llama_cpp_tensors(model, arch, config)
    tensors["rope_freqs.weight"] = torch.ones(8)  # llama.cpp's own; no module has it
    write_gguf(file, arch, tensors, kind, config)
    checkpoint = open_checkpoint(file, quantised=True)
    fitted = fit_names(checkpoint, empty(cls, config)).tensors
    wanted = dict(model.named_parameters())
    assert set(fitted) == set(wanted)
    for name, weight in wanted.items():
        expected = after_storing(weight.detach(), kind)
        if arch == "gemma3" and "norm" in name:
            expected = expected + 1 - 1
        assert fitted[name].shape == tuple(weight.shape)
        assert torch.equal(values(fitted[name]), expected), name
    in_place = [name for name, stored in fitted.items() if stored.in_one_range]
    moved = {name for name in fitted if name not in in_place}
    assert all("q_proj" in name or "k_proj" in name or "norm" in name for name in moved)
    assert (moved == set()) == (arch not in ("llama", "gemma3"))


@pytest.mark.parametrize("which", IN_TRANSFORMERS)
def test_the_same_tensors_as_transformers_reads(tmp_path, which):
    arch, cls, config = MODELS[which]
    model, file = small(cls, config), tmp_path / "m.gguf"
    write_gguf(file, arch, llama_cpp_tensors(model, arch, config), Q.Q8_0, config)
    theirs = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    fitted = fit_names(open_checkpoint(file, quantised=True), empty(cls, config)).tensors
    both = set(theirs) & set(fitted)
    assert len(both) == len(fitted)
    assert all(torch.equal(values(fitted[name]), theirs[name]) for name in both)


def test_a_gguf_file_without_blocks_is_loaded(tmp_path):
    arch, cls, config = MODELS["llama"]
    model, file = small(cls, config), tmp_path / "m.gguf"
    tensors = llama_cpp_tensors(model, arch, config)
    write_gguf(file, arch, tensors, Q.F32, config)
    loaded = distorch.load(empty(cls, config), file, "cpu,0b;disk,*", min_bytes=0)
    same_weights(loaded, model.state_dict())
    ids = torch.arange(6).reshape(1, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_transposed_weights_are_refused(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    model, file = small(GPT2LMHeadModel, config), tmp_path / "m.gguf"
    tensors = {k: v.T.contiguous() if "attn_qkv.weight" in k else v
               for k, v in llama_cpp_tensors(model, "gpt2", config).items()}  # fmt: skip
    write_gguf(file, "gpt2", tensors, Q.Q8_0)
    with pytest.raises(FormatError, match=r"blk.0.\S+weight' \(Q8_0.*blocks of 32"):
        fit_names(open_checkpoint(file, quantised=True), empty(GPT2LMHeadModel, config))


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
def test_a_diffusion_gguf_in_original_names(tmp_path, flux_of_width_64, kind):
    model, file = small(FluxTransformer2DModel, FLUX), tmp_path / "m.gguf"
    write_gguf(file, "flux", flux_original(model.state_dict()), kind)
    checkpoint = open_checkpoint(file, quantised=True)
    fitted = fit_names(checkpoint, empty(FluxTransformer2DModel, FLUX)).tensors
    wanted = model.state_dict()
    assert set(fitted) == set(wanted)
    for name, weight in wanted.items():
        assert torch.equal(values(fitted[name]), after_storing(weight, kind)), name
    fused = checkpoint.tensors["single_blocks.1.linear1.weight"]
    mlp = fitted["single_transformer_blocks.1.proj_mlp.weight"]
    assert mlp.in_one_range and mlp.block_type == kind.name
    assert (mlp.offset, mlp.nbytes) == (fused.offset + fused.nbytes * 3 // 7, fused.nbytes * 4 // 7)
