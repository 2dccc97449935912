"""Which of a folder's files has the weights, and in which dtype they are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch

from distorch.errors import FormatError
from distorch.formats.checkpoint import Checkpoint, open_checkpoint

# In the order in which transformers and diffusers look for them.
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_SUFFIXES = ("safetensors", "bin")


def weights_file(folder: Path, variant: str | None = None) -> Path:
    """The file, or the index, that a library would read; else the folder itself, for what is left
    to say of it. A variant ("fp16") that is not there is left out, as the libraries do.
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
    file = weights_file(folder, variant)
    if file.name.endswith(".json"):
        try:
            names = set(json.loads(file.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{str(file)!r} is no index of a sharded checkpoint"
        missing = sorted(str(name) for name in names if not (folder / str(name)).is_file())
        return f"{missing[0]!r} is missing, which {file.name!r} lists" if missing else ""
    if file != folder:
        return ""
    kinds = ("*.safetensors", "*.bin", "*.gguf")
    some = any(next(folder.glob(kind), None) is not None for kind in kinds)
    return "" if some else f"there are no weights in {str(folder)!r}"


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


def opened(file: Path) -> Checkpoint:
    """The headers of a checkpoint. FormatError."""
    try:
        return open_checkpoint(file)
    except OSError as error:
        raise FormatError(f"{str(file)!r} cannot be read: {error}") from error
