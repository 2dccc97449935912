# SPDX-License-Identifier: Apache-2.0
"""Which files make up a checkpoint: one, the shards that an index lists, or numbered parts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from distorch._small_files import kind_of, read_json
from distorch.errors import FormatError, SpecError

_FOLDER_PATTERNS = (
    "*.safetensors.index*.json", "*.safetensors", "*.bin.index*.json", "*.bin", "*.gguf",
)  # fmt: skip
_IS_INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")
_IS_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
_SHOWN = 4


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint, in order. `listed`: tensor -> file, where an index says so: what
    it does not list is not there, whatever the file has.
    """

    shown: str
    paths: tuple[Path, ...]
    listed: dict[str, Path] = field(default_factory=dict)
    parts: bool = False  # numbered, without an index


def find_files(path: str | os.PathLike[str]) -> Files:
    """From what the user named: a file, an index, one of several parts, or a folder.

    FormatError when that is none of them, is ambiguous, or a part is missing.
    """
    if not isinstance(path, str | os.PathLike):
        raise SpecError(
            f"file={path!r:.80}: expected the path of a checkpoint, got {type(path).__name__}"
        )
    target = Path(path)
    if kind_of(target) == "folder":
        target = _in_folder(target)
    if (kind := kind_of(target)) != "file":
        found = "no ordinary file" if kind else "no such file or folder"
        raise FormatError(
            f"{str(path)!r}: {found}; "
            "expected a checkpoint (.safetensors, its index, .gguf, .pt, .bin) or a folder with one"
        )
    if _IS_INDEX.search(target.name):
        return _listed(target)
    if part := _IS_PART.match(target.name):
        return Files(str(target), _all_parts(target, part), parts=True)
    return Files(str(target), (target,))


def _in_folder(folder: Path) -> Path:
    found = next(filter(None, (sorted(folder.glob(p)) for p in _FOLDER_PATTERNS)), [])
    if len(found) == 1 and (whole := folder / _IS_INDEX.sub("", found[0].name)).is_file():
        return whole  # one file that stands beside an index is newer: so do others choose
    if len(found) == 1 or _are_one_set(found):
        return found[0]
    names = ", ".join(path.name for path in found[:_SHOWN]) or "none"
    if not found and (folder / "model_index.json").is_file():
        raise FormatError(
            f"{str(folder)!r} is a pipeline of diffusers: give the folder of one part, such as "
            f"{str(folder / 'transformer')!r}; load_pipeline loads all of them"
        )
    raise FormatError(
        f"{str(folder)!r}: expected one *.safetensors, *.safetensors.index.json or *.gguf, "
        f"found {names}; name the file"
    )


def _are_one_set(found: Sequence[Path]) -> bool:
    parts = [_IS_PART.match(path.name) for path in found]
    sets = {part.group("stem", "count", "suffix") if part else None for part in parts}
    return len(sets) == 1 and None not in sets


def _all_parts(target: Path, part: re.Match[str]) -> tuple[Path, ...]:
    stem, count, suffix = part.group("stem", "count", "suffix")
    names = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    missing = [name for name in names if kind_of(target.parent / name) != "file"]
    if missing or target.name not in names:
        raise FormatError(
            f"{str(target)!r} is one of {int(count)} parts of a checkpoint, and "
            f"{', '.join(missing[:_SHOWN]) or 'its number'} is missing beside it: get all parts"
        )
    return tuple(_beside(target, name) for name in names)


def _listed(index: Path) -> Files:
    try:
        weight_map = read_json(index)["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{str(index)!r} is not an index of a sharded checkpoint: {error}"
        ) from error
    if not pairs:
        raise FormatError(f"{str(index)!r} is an index that lists no tensors: get it again")
    paths = {file: _beside(index, file) for file in set(pairs.values())}
    listed = {name: paths[file] for name, file in pairs.items()}
    return Files(str(index), tuple(sorted(set(paths.values()))), listed)


def _beside(named: Path, name: str) -> Path:
    """Another file of the same checkpoint. FormatError if its name or a link leads elsewhere.

    The index may be a stranger's. It must not make us read the user's other files. `named` may be
    a link itself, as in a cache of downloads; then the others may lie where it leads.
    """
    path = named.parent / name
    plain = PurePosixPath(name)
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # no file can have such a name
        real = path
    homes = Path(os.path.realpath(named.parent)), Path(os.path.realpath(named)).parent
    inside = any(home in real.parents for home in homes)
    if not inside or plain.is_absolute() or ".." in plain.parts:
        raise FormatError(
            f"{str(named)!r} names a file outside its folder: {name!r}. Files of one checkpoint "
            "lie in one folder: put a copy of it there if it is the right one"
        )
    return path
