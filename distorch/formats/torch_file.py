# SPDX-License-Identifier: Apache-2.0
"""Files that torch.save wrote: tensors by name, read with weights_only and mapped."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distorch.errors import FormatError
from distorch.formats.stored import StoredTensor

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
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
    _check_unpacked(path)
    try:
        loaded = _load(path)
    except Exception as error:  # a damaged pickle may ask torch for anything
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(
            f"{str(path)!r} is no file of tensors that torch.load(weights_only=True) reads "
            f"({said}); convert it to .safetensors where you trust it"
        ) from None  # torch's text quotes names from the file as they are
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


def _check_unpacked(path: Path) -> None:
    """FormatError if the archive has packed entries: a small file could fill all of the memory. Or
    if it is of a big-endian machine: torch crashes when it maps such a file.

    torch.save never packs. What is not packed takes no more than the file has. (Compiled modules
    have packed code, and torch refuses them.)
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [e.filename for e in entries if e.compress_type and "/code/" not in e.filename]
            orders = [e for e in entries if e.filename.endswith("/byteorder") and e.file_size < 16]
            big_endian = not packed and any(archive.read(e).strip() == b"big" for e in orders)
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, EOFError):
        return  # no archive, or one that torch refuses, too: an encrypted one, for example
    if big_endian:
        raise FormatError(f"{str(path)!r} was written by a big-endian machine, which is not read")
    if packed:
        raise FormatError(
            f"{str(path)!r} is an archive with packed entries ({packed[0]!r:.80}); expected one as "
            "torch.save writes it: unpack it, if it holds a file of weights"
        )


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
    """The tensors of a torch file as ranges of it, where it keeps them so; else in memory.

    No tensor that is given back is over a map of the file, which somebody may change or cut short.
    torch maps the file only for those that are no ranges: it maps it to write to, which fails if it
    is larger than the RAM.
    """
    ranges = _ranges(path)
    if ranges and None not in ranges.values():
        return {name: stored for name, stored in ranges.items() if stored is not None}
    tensors = read_torch_file(path)
    return {name: ranges.get(name) or _in_memory(name, t, path) for name, t in tensors.items()}


def _in_memory(name: str, tensor: Tensor, path: Path) -> StoredTensor:
    shape = () if tensor.is_nested else tuple(tensor.shape)
    if not _is_plain(tensor):  # refused where it is wanted
        kind = "a quantised tensor" if tensor.is_quantized else str(tensor.layout)
        kind = "a nested tensor" if tensor.is_nested else kind
        return StoredTensor(name, str(path), 0, 0, torch.uint8, shape, block_type=kind)
    nbytes = tensor.numel() * tensor.element_size()
    data = tensor.detach().resolve_conj().resolve_neg().clone()
    return StoredTensor(name, str(path), 0, nbytes, tensor.dtype, shape, data)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _ranges(path: Path) -> dict[str, StoredTensor | None]:
    """Where each tensor lies in the file, None for one that is no range of it; empty when the file
    is no zip. No weight is read.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    _check_unpacked(path)
    try:
        with FakeTensorMode() as fake:
            fake.cache_enabled = False  # it is the process's, and would keep entries of every file
            loaded = _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # read_torch_file says what is wrong with it
        return {}
    tensors = loaded.items() if isinstance(loaded, Mapping) else ()
    size = path.stat().st_size
    return {
        str(name): _range(str(name), value, path, size)
        for name, value in tensors
        if isinstance(value, Tensor)
    }


def _range(name: str, tensor: Tensor, path: Path, size: int) -> StoredTensor | None:
    if not _is_plain(tensor):
        return None
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    nbytes = tensor.numel() * tensor.element_size()
    if begin is None or tensor.is_neg() or tensor.is_conj() or not nbytes:
        return None
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    first = int(begin) + int(tensor.storage_offset()) * tensor.element_size()
    shape = tuple(tensor.shape)
    stored = StoredTensor(name, str(path), first, nbytes, tensor.dtype, shape, strides=strides)
    if stored.span[1] > min(int(begin) + storage.nbytes(), size):
        return None  # torch says what is wrong with it
    return stored
