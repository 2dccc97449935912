# SPDX-License-Identifier: Apache-2.0
"""Files that torch.save wrote: tensors by name, read with weights_only and mapped."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distorch.errors import FormatError
from distorch.formats.stored import StoredTensor

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# What torch's unpickler raises on bytes that are no file of its own.
_DAMAGED = (
    RuntimeError, pickle.UnpicklingError, OSError, ValueError, EOFError, IndexError, KeyError,
    TypeError, AttributeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")


def is_torch_file(path: Path) -> bool:
    """Whether the file can be read and starts as the archives of torch.save do."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped where it allows that. FormatError when it is none."""
    try:
        loaded = _load(path)
    except _DAMAGED as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(
            f"{str(path)!r} is no file of tensors that torch.load(weights_only=True) reads "
            f"({said}); convert it to .safetensors where you trust it"
        ) from error
    loaded = _unwrapped(loaded)
    tensors = (
        {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not tensors:
        raise FormatError(
            f"{str(path)!r} holds a {type(loaded).__name__}, no tensors by name; expected a state "
            "dict, as torch.save(model.state_dict(), ...) writes it"
        )
    return tensors


def _unwrapped(loaded: Any) -> Any:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    return loaded


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)  # the old format


def stored_in_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a torch file as ranges of it, where it keeps them so; else mapped."""
    tensors = read_torch_file(path)
    offsets = _storage_offsets(path)
    found = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:  # refused where it is wanted
            kind = "a quantised tensor" if tensor.is_quantized else str(tensor.layout)
            shape = tuple(tensor.shape)
            found[name] = StoredTensor(name, str(path), 0, 0, torch.uint8, shape, block_type=kind)
            continue
        nbytes = tensor.numel() * tensor.element_size()
        begin = offsets.get(name)
        plain = tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()
        ranged = begin is not None and plain and nbytes > 0
        offset = 0
        if ranged and begin is not None:
            offset = begin + int(tensor.storage_offset()) * tensor.element_size()
        found[name] = StoredTensor(
            name, str(path), offset, nbytes, tensor.dtype, tuple(tensor.shape),
            None if ranged else tensor,
        )  # fmt: skip
    return found


def _storage_offsets(path: Path) -> dict[str, int]:
    """Where each tensor's storage begins in the file, in bytes; empty when the file is no zip."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            loaded = _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
    except _DAMAGED:
        return {}
    offsets = {}
    for name, tensor in loaded.items() if isinstance(loaded, Mapping) else ():
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
            if begin is not None:
                offsets[str(name)] = int(begin)
    return offsets
