# SPDX-License-Identifier: Apache-2.0
"""A checkpoint: a safetensors, torch or GGUF file, a sharded one, or a folder with one."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distorch._small_files import kind_of
from distorch.errors import FormatError
from distorch.formats import gguf
from distorch.formats.block_types import PACKED_TYPES
from distorch.formats.files import Files, find_files
from distorch.formats.quantisation import with_declarations
from distorch.formats.safetensors import read_header
from distorch.formats.scales import OF_THEIR_OWN
from distorch.formats.stored import StoredTensor
from distorch.formats.torch_file import TORCH_SUFFIXES, is_torch_file, stored_in_torch_file
from distorch.formats.unchanged import Stamp, Sums, changed_meanwhile, live_sums, stamp_of
from distorch.planner import Inventory, WeightInfo

_NO_WEIGHTS = ("spiece_model", "tekken_model", "scaled_fp8", "__index_timestep_zero__")


@dataclass(frozen=True)
class Opened:
    """A file of a checkpoint: its stamp when its header was read; where its tensors begin and end,
    in bytes; and its checksums, if it is verified (Note [Verified files]).
    """

    stamp: Stamp
    cuts: tuple[int, ...]
    sums: Sums | None


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, in file order, and the metadata of the (first) file. `opened`: its files, by
    their real paths.
    """

    path: str
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    is_gguf: bool = False  # such files keep small tensors in float32, whatever they were
    opened: dict[str, Opened] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_verified(self) -> None:
        """FormatError if a file is not the one whose checksums are known."""
        for path, opened in self.opened.items():
            if opened.sums is None:
                raise FormatError(changed_meanwhile(path))

    def inventory(self) -> Inventory:
        """The file's tensors as a planner sees them, in the order of the file.

        Many files sort names by the alphabet: "layers.10" comes before "layers.2". In these,
        numbers are sorted by their value, as the model has its layers.
        """
        names = [name for name in self.tensors if not is_no_weight(name)]
        if names == sorted(names):
            names.sort(key=_by_numbers)
        return Inventory(tuple(weight_info(self.tensors[name], name) for name in names))


def _by_numbers(name: str) -> list[str | int]:
    """A key for sorting: letters by the alphabet, numbers by their value."""
    # Text and numbers alternate, so text is compared with text and numbers with numbers.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def is_no_weight(name: str) -> bool:
    """Whether a file has it for other programs: tokenizers, markers of a format or a version."""
    return name.rpartition(".")[2] in _NO_WEIGHTS


def dtype_name(tensor: StoredTensor) -> str:
    """ "bfloat16", "Q4_K", "nvfp4"."""
    if tensor.block_type in PACKED_TYPES and tensor.declared is not None:
        return str(tensor.declared.told["format"])
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
        in_file=tensor.in_one_range,
    )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the headers only. FormatError when there is nothing to read or it is damaged, and
    FetchError if what is read of a file that is verified is not what it was.
    """
    files = find_files(path)
    tensors: dict[str, StoredTensor] = {}
    headers: list[dict[str, str]] = []
    opened: dict[str, Opened] = {}
    wanted = _Listed(files)
    for number, file in enumerate(files.paths):
        part = (number, len(files.paths)) if files.parts else None
        if kind_of(file) != "file":
            raise FormatError(
                f"{files.shown!r} lists {file.name!r}, which is not there: get the whole checkpoint"
            )
        real, stamp = file.resolve(), stamp_of(file)
        sums = live_sums(real, stamp)
        found, metadata = _read_compared(file, part, sums)
        cuts = [cut for tensor in found.values() if tensor.data is None for cut in tensor.span]
        opened[str(real)] = Opened(stamp, tuple(cuts), sums)
        headers.append(metadata)
        if files.listed:
            found = wanted.of(file, found)
        if twice := found.keys() & tensors.keys():
            raise FormatError(
                f"{files.shown!r}: {min(twice)!r} is in {file.name!r} and in a part before it; "
                "expected each tensor once"
            )
        tensors |= found
    return Checkpoint(
        files.shown,
        with_declarations(tensors, headers, files.shown),
        next(filter(None, headers), {}),
        gguf.is_gguf(files.paths[0]),
        opened,
    )


class _Listed:
    """What an index lists, file by file."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._names: dict[Path, set[str]] = {}
        for name, file in files.listed.items():
            self._names.setdefault(file, set()).add(name)

    def of(self, file: Path, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """What it lists in one file, and what lies there beside a listed weight: some writers list
        the weights alone. FormatError if the file lacks a listed tensor.
        """
        names, shown = self._names[file], self._files.shown
        if lost := sorted(names - found.keys()):
            raise FormatError(
                f"{shown!r} lists {lost[0]!r} in {file.name!r}, which lacks it: index and file "
                "are not of one version; get the whole checkpoint"
            )
        layers = {name.rpartition(".")[0] for name in names if name.endswith(".weight")}
        return {
            name: tensor
            for name, tensor in found.items()
            if name in names or (name not in self._files.listed and _is_beside(name, layers))
        }


def _is_beside(name: str, layers: Collection[str]) -> bool:
    layer, _, leaf = name.rpartition(".")
    return layer in layers and leaf not in OF_THEIR_OWN


def _read_compared(
    path: Path, part: tuple[int, int] | None, sums: Sums | None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """As `_read_file`. FetchError if what was read is not what it was."""
    if sums is None:
        return _read_file(path, part)
    try:
        found, metadata = _read_file(path, part)
    except FormatError:
        sums.compare_all()  # if bytes have changed, that is what is wrong
        raise
    sums.compare_unread([*found.values()])
    return found, metadata


def _read_file(
    path: Path, part: tuple[int, int] | None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The kind is said by the name that the user knows, the bytes are where its links lead: in a
    cache of downloads those are blobs without a suffix.
    """
    target = path.resolve()
    if path.suffix in TORCH_SUFFIXES:
        return stored_in_torch_file(target), {}
    if path.suffix == ".gguf" or gguf.is_gguf(target):
        return gguf.read_header(target, part)
    if path.suffix != ".safetensors" and is_torch_file(target):
        return stored_in_torch_file(target), {}
    return read_header(target)
