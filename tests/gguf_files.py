# SPDX-License-Identifier: Apache-2.0
"""GGUF files as others write them."""

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType


def write_gguf(path, arch, tensors, kind, config=None):
    """`tensors` by their names in the file; matrices as `kind` where its blocks fit. `config` is that
    of a language model, with the names of transformers: its numbers go into the file.
    """
    writer = gguf.GGUFWriter(path, arch)
    if config is not None:
        _add_numbers(writer, config)
    for name, tensor in tensors.items():
        fits = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        data = tensor.float().numpy()
        if kind == Q.F32 or (not fits and tensor.dim() == 1):
            writer.add_tensor(name, data)
        elif not fits:
            writer.add_tensor(name, data.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_numbers(writer, config):
    """What a reader makes a configuration of."""
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    for add, name in (
        (writer.add_block_count, "num_hidden_layers"), (writer.add_embedding_length, "hidden_size"),
        (writer.add_feed_forward_length, "intermediate_size"),
        (writer.add_vocab_size, "vocab_size"), (writer.add_rope_dimension_count, "head_dim"),
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"),
    ):  # fmt: skip
        value = getattr(config, name, None)
        if value is not None:
            add(value)


def write_blocks(path, layers, width):
    """Square matrices "0.weight", "1.weight", ... of random Q8_0 blocks with small scales."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "test")
    for i in range(layers):
        blocks = generator.integers(0, 256, (width, width // 32 * 34), dtype=np.uint8)
        blocks.reshape(-1, 34)[:, :2] = np.float16(0.01).reshape(1).view(np.uint8)
        writer.add_tensor(f"{i}.weight", blocks, raw_dtype=Q.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(weight, heads):
    """As llama.cpp's converter stores q and k: the two halves of a head's rows alternate."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


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
