# SPDX-License-Identifier: Apache-2.0
"""Small weights in ComfyUI's formats, and what comfy-kitchen decodes them to: kitchen.safetensors.

usage: python make_kitchen.py     (needs comfy_kitchen; the file was made with 0.2.40)
"""

import dataclasses
import json
from pathlib import Path

import comfy_kitchen.tensor
import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 9, 128  # rows that nvfp4 and mxfp8 pad
TURNED = {"convrot_groupsize": 64}
# Our name -> the layout, arguments for it, what a file declares.
KINDS = {
    "int8": (
        "TensorWiseINT8Layout", {"per_channel": True, "convrot": True, **TURNED},
        {"format": "int8_tensorwise", "convrot": True, **TURNED},
    ),
    "int4": ("TensorCoreConvRotW4A4Layout", TURNED, {"format": "convrot_w4a4", **TURNED}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}),
    "w4a8": (
        "AsymW4A8Int8Layout", TURNED, {"format": "asym_w4a8_int8", "group_size": 16, **TURNED},
    ),
    "w4a8 without a codebook": (
        "AsymW4A8Int8Layout", {"codebook": False, "group_size": 32, **TURNED},
        {"format": "asym_w4a8_int8", "group_size": 32, **TURNED},
    ),
    "w6a8": (
        "AsymW4A8Int8Layout", {"bits": 6, **TURNED}, {"format": "asym_w4a8_int8", **TURNED},
    ),
}  # fmt: skip


def main():
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * 0.05
    tensors, metadata = {"weight": weight}, {}
    for kind, (name, arguments, told) in KINDS.items():
        layout = getattr(comfy_kitchen.tensor, name)
        numbers, params = layout.quantize(weight, **arguments)
        for suffix, part in layout.state_dict_tensors(numbers, params).items():
            known = part.dtype != torch.float8_e8m0fnu
            tensors[f"{kind}/weight{suffix}"] = part if known else part.view(torch.uint8)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wanted = layout.dequantize(numbers, dataclasses.replace(params, orig_dtype=dtype))
            tensors[f"{kind}/{dtype}"] = wanted[:ROWS, :COLUMNS]
        metadata[kind] = json.dumps(told)
    path = Path(__file__).parent / "kitchen.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


if __name__ == "__main__":
    main()
