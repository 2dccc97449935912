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


def quantise(weights: dict[str, torch.Tensor], architecture: str, target: Path) -> None:
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
    save_file(decoded, target.with_suffix(".safetensors"))


if __name__ == "__main__":
    folder = Path(sys.argv[1]) / "diffusion_models"
    quantise(load_file(folder / "flux.safetensors"), "flux", folder / "flux-q.gguf")
