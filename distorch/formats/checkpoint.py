"""A checkpoint: a safetensors, torch or GGUF file, a sharded one, or a folder with one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distorch.errors import FormatError
from distorch.formats import gguf
from distorch.formats.safetensors import StoredTensor, read_header
from distorch.formats.torch_file import TORCH_SUFFIXES, stored_in_torch_file
from distorch.planner import Inventory, WeightInfo

# Prefixes that whole-model files put before the names of the module's own weights.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, in file order, and the metadata of the (first) file."""

    path: str
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

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
    target = Path(path)
    if target.is_dir():
        target = _in_folder(target)
    if target.name.endswith(".index.json"):
        return _open_index(target)
    if not target.is_file():
        raise FormatError(f"{str(path)!r}: no such file; expected a .safetensors or .gguf file")
    tensors, metadata = _read_file(target.resolve(), quantised)
    return Checkpoint(str(target), tensors, metadata)


def _read_file(
    path: Path, quantised: bool = False
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    if path.suffix in TORCH_SUFFIXES:
        return stored_in_torch_file(path), {}
    if path.suffix == ".gguf" or gguf.is_gguf(path):
        return _read_gguf(path, quantised)
    return read_header(path)


def _read_gguf(path: Path, quantised: bool) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    tensors, metadata = gguf.read_header(path)
    blocks = [tensor for tensor in tensors.values() if tensor.block_type]
    if blocks and not quantised:
        raise FormatError(
            f"{str(path)!r} has quantised tensors ({blocks[0].name!r} is {blocks[0].block_type}), "
            "which cannot be loaded yet"
        )
    return tensors, metadata


_FOLDER_PATTERNS = (
    "*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.gguf",
)  # fmt: skip


def _in_folder(folder: Path) -> Path:
    found = next(filter(None, (sorted(folder.glob(p)) for p in _FOLDER_PATTERNS)), [])
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found[:4]) or "none"
    raise FormatError(
        f"{str(folder)!r}: expected one *.safetensors, *.safetensors.index.json or *.gguf, "
        f"found {names}; name the file"
    )


def _open_index(index: Path) -> Checkpoint:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{str(index)!r} is not an index of a sharded checkpoint: {error}"
        ) from error
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if Path(name).name != name:
            raise FormatError(f"{str(index)!r} names a file outside its folder: {name!r}")
        found, metadata = _read_file((index.parent / name).resolve())
        tensors |= found
    if missing := [name for name in weight_map if name not in tensors]:
        raise FormatError(f"{str(index)!r} lists {missing[0]!r}, which none of its files has")
    return Checkpoint(str(index), tensors, metadata if files else {})


def match_names(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Wanted name -> stored name, with the prefix stripped that makes most names fit."""
    have, need = set(stored), list(wanted)
    best: dict[str, str] = {}
    for prefix in ("", *PREFIXES):
        fits = {name: prefix + name for name in need if prefix + name in have}
        if len(fits) > len(best):
            best = fits
    return best
