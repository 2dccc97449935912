# SPDX-License-Identifier: Apache-2.0
"""GGUF files of what checkpoints.py made, and safetensors with the numbers that they decode to.

usage: quantise.py MODELS_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

Kind = gguf.GGMLQuantizationType
KINDS = (Kind.Q8_0, Kind.Q4_0, Kind.Q5_1)


def t5_base() -> dict[str, tuple[str, tuple[int, ...]]]:
    """llama.cpp's name -> the host's, and the shape, of a small T5 encoder."""
    width, inner, heads = 768, 3072, 12
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd": ("shared", (32128, width)),
        "enc.output_norm": ("encoder.final_layer_norm", (width,)),
    }
    for i in range(12):
        ours, theirs = f"enc.blk.{i}.", f"encoder.block.{i}.layer."
        for part in "qkvo":
            found[f"{ours}attn_{part}"] = f"{theirs}0.SelfAttention.{part}", (width, width)
        found[f"{ours}attn_norm"] = f"{theirs}0.layer_norm", (width,)
        found[f"{ours}ffn_up"] = f"{theirs}1.DenseReluDense.wi", (inner, width)
        found[f"{ours}ffn_down"] = f"{theirs}1.DenseReluDense.wo", (width, inner)
        found[f"{ours}ffn_norm"] = f"{theirs}1.layer_norm", (width,)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    found["enc.blk.0.attn_rel_b"] = bias, (32, heads)
    return found


def quantise_t5(target: Path) -> None:
    """A T5 encoder under llama.cpp's names, and decoded under the host's."""
    generator = torch.Generator().manual_seed(5)
    names = t5_base()
    weights = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, (_, shape) in names.items()
    }
    renamed = {f"{name}.weight": f"{theirs}.weight" for name, (theirs, _) in names.items()}
    quantise(weights, "t5encoder", target, renamed)


def quantise(
    weights: dict[str, torch.Tensor],
    architecture: str,
    target: Path,
    renamed: dict[str, str] | None = None,
) -> None:
    """Writes `target` (.gguf) with the kinds in turn, and beside it the decoded .safetensors."""
    writer = gguf.GGUFWriter(target, architecture)
    decoded = {}
    for index, (name, tensor) in enumerate(weights.items()):
        values = tensor.float().numpy()
        kind = KINDS[index % len(KINDS)]
        if tensor.dim() < 2 or values.shape[-1] % 32:
            writer.add_tensor(name, values)
            decoded[name] = tensor.float().contiguous()
            continue
        blocks = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        numbers = gguf.quants.dequantize(blocks, kind).reshape(values.shape)
        decoded[name] = torch.from_numpy(np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {(renamed or {}).get(name, name): tensor for name, tensor in decoded.items()}
    save_file(found, target.with_suffix(".safetensors"))


if __name__ == "__main__":
    quantise_t5(Path(sys.argv[1]) / "text_encoders" / "t5-q.gguf")
    folder = Path(sys.argv[1]) / "diffusion_models"
    quantise(load_file(folder / "flux.safetensors"), "flux", folder / "flux-q.gguf")
