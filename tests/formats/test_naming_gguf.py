# SPDX-License-Identifier: Apache-2.0
"""GGUF files in llama.cpp's names and in original ones: the weights of the module, as stored."""

import gguf
import pytest
import torch
from diffusers import FluxTransformer2DModel
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
from tests.formats.originals import (
    FLUX,
    empty,
    flux_original,
    same_weights,
    small,
)
from tests.gguf_files import llama_cpp_tensors, write_gguf

Q = gguf.GGMLQuantizationType

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


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
@pytest.mark.parametrize("which", MODELS)
def test_llama_cpp_names_fill_a_transformers_module(tmp_path, which, kind):
    arch, cls, config = MODELS[which]
    model, file = small(cls, config), tmp_path / "m.gguf"
    tensors = llama_cpp_tensors(model, arch, config)
    tensors["rope_freqs.weight"] = torch.ones(8)  # llama.cpp's own; no module has it
    write_gguf(file, arch, tensors, kind, config)
    checkpoint = open_checkpoint(file)
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
    fitted = fit_names(open_checkpoint(file), empty(cls, config)).tensors
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
        fit_names(open_checkpoint(file), empty(GPT2LMHeadModel, config))


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
def test_a_diffusion_gguf_in_original_names(tmp_path, small_widths, kind):
    model, file = small(FluxTransformer2DModel, FLUX), tmp_path / "m.gguf"
    write_gguf(file, "flux", flux_original(model.state_dict()), kind)
    checkpoint = open_checkpoint(file)
    fitted = fit_names(checkpoint, empty(FluxTransformer2DModel, FLUX)).tensors
    wanted = model.state_dict()
    assert set(fitted) == set(wanted)
    for name, weight in wanted.items():
        assert torch.equal(values(fitted[name]), after_storing(weight, kind)), name
    fused = checkpoint.tensors["single_blocks.1.linear1.weight"]
    mlp = fitted["single_transformer_blocks.1.proj_mlp.weight"]
    assert mlp.in_one_range and mlp.block_type == kind.name
    assert (mlp.offset, mlp.nbytes) == (fused.offset + fused.nbytes * 3 // 7, fused.nbytes * 4 // 7)
