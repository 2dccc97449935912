# SPDX-License-Identifier: Apache-2.0
"""Which of a folder's files has the weights, and in which dtype they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from distorch.errors import FormatError
from distorch.formats.checkpoint import Checkpoint
from distorch.formats.files import find_files

# In the order in which transformers and diffusers look for them.
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_SUFFIXES = ("safetensors", "bin")


def weights_file(folder: Path, variant: str | None = None) -> Path:
    """The file, or the index, that a library would read; the folder itself if it has none of the
    usual names. Where a variant ("fp16") is not there, it is the file without, as the libraries do.
    """
    for kind in [variant, None] if variant else [None]:
        dotted = f".{kind}" if kind else ""
        for suffix in _SUFFIXES:
            for stem in _STEMS:
                names = (
                    f"{stem}{dotted}.{suffix}",
                    f"{stem}.{suffix}.index{dotted}.json",
                    f"{stem}{dotted}.{suffix}.index.json",
                )
                if found := next((folder / n for n in names if (folder / n).is_file()), None):
                    return found
    return folder


def lacking(folder: Path, variant: str | None = None) -> str:
    """Why the weights of a folder cannot be read, in words; "" if they can."""
    chosen = weights_file(folder, variant)
    kinds = ("*.safetensors", "*.bin", "*.gguf")
    if chosen == folder and all(next(folder.glob(kind), None) is None for kind in kinds):
        return f"there are no weights in {str(folder)!r}"
    try:
        files = find_files(chosen)
    except FormatError as error:
        return str(error)
    missing = next((path.name for path in files.paths if not path.is_file()), None)
    return "" if missing is None else f"{missing!r} is missing, which {files.shown!r} lists"


def floating_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most bytes have; bfloat16 if they are narrower than 16 bits."""
    held: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.tensors.values():
        wide = tensor.block_type is None and tensor.dtype.itemsize > 1
        if wide and tensor.dtype.is_floating_point:
            held[tensor.dtype] += tensor.nbytes
    wide_bytes = sum(held.values())
    if 2 * wide_bytes < checkpoint.total_bytes or not held:
        return torch.bfloat16
    return held.most_common(1)[0][0]
