# SPDX-License-Identifier: Apache-2.0
"""LoRA files and state dicts as tensors by key, with what their makers say about scales."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distorch._memory import host_memory
from distorch._small_files import kind_of, read_table
from distorch.display.tables import human_bytes
from distorch.errors import FormatError, SpecError, warn_at_caller
from distorch.formats.safetensors import read_header
from distorch.formats.torch_file import TORCH_SUFFIXES, read_torch_file
from distorch.lora.configuration import (
    PEFT_PREFIX,
    Configuration,
    is_configured,
    read_configuration,
)
from distorch.lora.targets import component_of

_PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_NAMES = (*_PEFT_NAMES, "pytorch_lora_weights.safetensors")
_CONFIG_NAME = "adapter_config.json"
_LONGEST_KEY = 1 << 16  # characters
_LARGE = 64 << 20  # bytes that a tensor may seem to have more than it has


@dataclass(eq=False)
class LoraFile:
    """One LoRA: its tensors, and what they come with."""

    label: str
    tensors: Mapping[str, Tensor]
    configuration: Configuration


LoraSource = str | os.PathLike[str] | Mapping[str, Tensor] | LoraFile


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 of those made in inference mode, which do not count."""
    try:
        return tensor._version
    except RuntimeError:  # also of a tensor that only has the memory of such a one
        return 0


def identity_of(source: LoraSource) -> object:
    """What tells whether a source is the one that was read before."""
    if isinstance(source, Mapping):
        return ("mapping", id(source), *((k, id(v), version_of(v)) for k, v in source.items()))
    if isinstance(source, LoraFile):
        return ("file", id(source))
    path = _file_of(source)
    files = [path, path.parent / _CONFIG_NAME]
    return tuple(
        (str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size)
        for file in files
        if file.is_file()
    )


def read_lora(source: LoraSource) -> LoraFile:
    """Reads a state dict, a safetensors or torch file, or a folder that PEFT or diffusers wrote.

    FormatError when it is damaged or holds no tensors.
    """
    if isinstance(source, LoraFile):
        return source
    if isinstance(source, Mapping):
        bad = [key for key, value in source.items() if not isinstance(value, Tensor)]
        if bad:
            raise FormatError(
                f"a LoRA state dict: {bad[0]!r} is a {type(source[bad[0]]).__name__}, no tensor"
            )
        label = "a LoRA state dict"
        _check_tensors(label, source)
        if _is_of_peft(source):
            _warn_without_strength(label, source, {})
        return LoraFile(label, source, Configuration(label))
    path = _file_of(source)
    metadata: dict[str, str] = {}
    if path.suffix in TORCH_SUFFIXES:
        tensors = read_torch_file(path)
        _check_tensors(f"LoRA {str(path)!r}", tensors)
        _check_fits(path, sum(t.numel() * t.element_size() for t in tensors.values()))
        # torch maps the file, and what is over a map changes with the file.
        tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    else:
        stored, metadata = read_header(path.resolve())
        _check_fits(path, sum(tensor.nbytes for tensor in stored.values()))
        tensors = {name: tensor.read() for name, tensor in stored.items()}
        _check_tensors(f"LoRA {str(path)!r}", tensors)
    configuration = read_configuration(
        repr(str(path)), metadata, _config_beside(path, tensors, metadata)
    )
    return LoraFile(configuration.label, tensors, configuration)


def _check_tensors(label: str, tensors: Mapping[str, Tensor]) -> None:
    """FormatError on what is no key of a LoRA, or no plain tensor of real numbers."""
    for key, tensor in tensors.items():
        if len(key) > _LONGEST_KEY:
            raise FormatError(f"{label}: a key has {len(key)} characters ({key[:40]!r}...)")
        plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
        if not plain or tensor.is_quantized or tensor.is_complex():
            raise FormatError(
                f"{label}: {key!r} is no plain tensor of real numbers, but {tensor.layout}, "
                f"{tensor.dtype} on {tensor.device}"
            )
        if tensor.numel() * tensor.element_size() > max(_LARGE, tensor.untyped_storage().nbytes()):
            raise FormatError(
                f"{label}: {key!r} shows the numbers that it has again and again, as expand() does"
            )


def _check_fits(path: Path, nbytes: int) -> None:
    """A file with holes is small on the disk, and may claim more than there is memory."""
    _, free = host_memory()
    if nbytes > free:
        raise FormatError(
            f"LoRA {str(path)!r} has {human_bytes(nbytes)} of tensors, and {human_bytes(free)} "
            "of RAM are free: is it a whole model?"
        )


def parts_of_lora(file: LoraFile) -> dict[str, LoraFile]:
    """The same LoRA by the part of a pipeline that its keys name: "model", "text 1", "text 2", ...;
    "" is for keys that name none.
    """
    by_part: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        by_part.setdefault(component_of(key), {})[key] = tensor
    return {
        part: LoraFile(file.label, tensors, file.configuration) for part, tensors in by_part.items()
    }


def _file_of(source: str | os.PathLike[str]) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise SpecError(
            f"loras: expected the path of a LoRA or its state dict, got {type(source).__name__}"
        )
    path = Path(source)
    if kind_of(path) == "folder":
        path = _in_folder(path)
    if (kind := kind_of(path)) != "file":
        found = "no ordinary file" if kind else "no such file"
        raise FormatError(
            f"LoRA {str(path)!r}: {found}; expected a .safetensors or torch file, or an "
            "adapter's folder"
        )
    return path


def _in_folder(folder: Path) -> Path:
    for name in _ADAPTER_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found[:4]) or "none"
    raise FormatError(f"LoRA folder {str(folder)!r}: expected one .safetensors, found {names}")


def _is_of_peft(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(PEFT_PREFIX) for key in tensors)


def _warn_without_strength(
    label: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """PEFT keeps alpha and rank in a file of its own, which is not there."""
    if not is_configured(metadata) and not any(key.endswith(".alpha") for key in tensors):
        warn_at_caller(
            f"{label} has keys of PEFT, and neither a configuration nor alphas: how strong it is "
            "is not known, 1 is taken. Give the adapter's folder, or multiply the strength by "
            "alpha / rank",
            UserWarning,
        )


def _config_beside(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """PEFT's configuration, where the file is one of PEFT's: by its name, or by its keys."""
    config = path.parent / _CONFIG_NAME
    named = path.name in _PEFT_NAMES
    if not named and not _is_of_peft(tensors):
        return {}
    if not config.is_file():
        if named:
            raise FormatError(
                f"LoRA {str(path)!r}: its {_CONFIG_NAME} is missing beside it; PEFT keeps there "
                "how strong the LoRA is. Copy it there; or give the tensors as a state dict, and "
                "alpha / rank times the strength"
            )
        _warn_without_strength(f"LoRA {str(path)!r}", tensors, metadata)
        return {}
    return read_table(config)
