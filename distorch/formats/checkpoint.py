"""A checkpoint: a safetensors, torch or GGUF file, a sharded one, or a folder with one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distorch.errors import FormatError
from distorch.formats import gguf
from distorch.formats.files import find_files
from distorch.formats.safetensors import StoredTensor, read_header
from distorch.formats.torch_file import TORCH_SUFFIXES, is_torch_file, stored_in_torch_file
from distorch.planner import Inventory, WeightInfo

# Prefixes that whole-model files put before the names of the module's own weights.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, in file order, and the metadata of the (first) file."""

    path: str
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    is_gguf: bool = False  # such files keep small tensors in float32, whatever they were

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def inventory(self) -> Inventory:
        """The file's tensors as a planner sees them."""
        return Inventory(
            tuple(weight_info(tensor, tensor.name) for tensor in self.tensors.values())
        )


def dtype_name(tensor: StoredTensor) -> str:
    """ "bfloat16", "Q4_K"."""
    return tensor.block_type or str(tensor.dtype).removeprefix("torch.")


def weight_info(tensor: StoredTensor, name: str, aliases: tuple[str, ...] = ()) -> WeightInfo:
    """One stored tensor under the name that the module gives it."""
    return WeightInfo(
        name=name,
        nbytes=tensor.nbytes,
        shape=tensor.shape,
        dtype=dtype_name(tensor),
        floating=tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1,
        aliases=aliases,
    )


def open_checkpoint(path: str | os.PathLike[str], *, quantised: bool = False) -> Checkpoint:
    """Reads the headers only. FormatError when there is nothing to read or it is damaged.

    Without `quantised` a file that stores tensors in blocks is refused: for callers that take
    `nbytes` for elements of `dtype`.
    """
    files = find_files(path)
    tensors: dict[str, StoredTensor] = {}
    told: dict[str, str] = {}
    for number, file in enumerate(files.paths):
        part = (number, len(files.paths)) if files.parts else None
        found, metadata = _read_file(file, quantised, part)
        told = told or metadata
        wanted = [name for name, place in files.listed.items() if place == file]
        if lost := [name for name in wanted if name not in found]:
            raise FormatError(f"{files.shown!r} lists {lost[0]!r} in {file.name!r}, which lacks it")
        if wanted:
            found = {name: tensor for name, tensor in found.items() if name in set(wanted)}
        if twice := found.keys() & tensors.keys():
            raise FormatError(
                f"{files.shown!r}: {min(twice)!r} is in {file.name!r} and in a part before it; "
                "expected each tensor once"
            )
        tensors |= found
    return Checkpoint(files.shown, tensors, told, gguf.is_gguf(files.paths[0]))


def _read_file(
    path: Path, quantised: bool, part: tuple[int, int] | None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The kind is said by the name that the user knows, the bytes are where its links lead: in a
    cache of downloads those are blobs without a suffix.
    """
    target = path.resolve()
    if path.suffix in TORCH_SUFFIXES:
        return stored_in_torch_file(target), {}
    if path.suffix == ".gguf" or gguf.is_gguf(target):
        return _read_gguf(target, quantised, part)
    if path.suffix != ".safetensors" and is_torch_file(target):
        return stored_in_torch_file(target), {}
    return read_header(target)


def _read_gguf(
    path: Path, quantised: bool, part: tuple[int, int] | None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    tensors, metadata = gguf.read_header(path, part)
    blocks = [tensor for tensor in tensors.values() if tensor.block_type]
    if blocks and not quantised:
        raise FormatError(
            f"{str(path)!r} has quantised tensors ({blocks[0].name!r} is {blocks[0].block_type}), "
            "which cannot be loaded yet"
        )
    return tensors, metadata


def match_names(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Wanted name -> stored name, with the prefix stripped that makes most names fit."""
    have, need = set(stored), list(wanted)
    best: dict[str, str] = {}
    for prefix in ("", *PREFIXES):
        fits = {name: prefix + name for name in need if prefix + name in have}
        if len(fits) > len(best):
            best = fits
    return best
