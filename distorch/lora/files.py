"""LoRA files and state dicts as tensors by key, with what their makers say about scales."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distorch.errors import FormatError
from distorch.formats.safetensors import read_header
from distorch.formats.torch_file import TORCH_SUFFIXES, read_torch_file
from distorch.lora.assemble import Scaling

LoraSource = str | os.PathLike[str] | Mapping[str, Tensor]

_ADAPTER_NAMES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
)
_CONFIG_NAME = "adapter_config.json"


@dataclass(eq=False)
class LoraFile:
    """One LoRA: its tensors, and the configuration that came with it (PEFT's names)."""

    label: str
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None  # of the whole file

    def scaling(self, stem: str, own_alpha: float | None) -> Scaling:
        """How strong the patch of one target is at strength 1."""
        config = self.config
        rank = _by_pattern(config, "rank_pattern", stem, config.get("r"))
        alpha = own_alpha
        if alpha is None:
            whole = config.get("lora_alpha", config.get("alpha"))
            alpha = _by_pattern(config, "alpha_pattern", stem, whole)
        if alpha is None:
            alpha = self.alpha
        terms = 0
        if config.get("use_cayley_neumann", False):
            terms = int(config.get("num_cayley_neumann_terms", 5))
        try:
            return Scaling(
                None if alpha is None else float(alpha),
                None if rank is None else int(rank),
                bool(config.get("use_rslora", False)),
                terms,
            )
        except (TypeError, ValueError) as error:
            raise FormatError(f"{self.label}: alpha or rank of {stem!r} is no number") from error


def _by_pattern(config: Mapping[str, Any], table: str, stem: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the end of a module's name."""
    for pattern, value in (config.get(table) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", stem):
            return value
    return default


def identity_of(source: LoraSource) -> object:
    """What tells whether a source is the one that was read before."""
    if isinstance(source, Mapping):
        return ("mapping", id(source), *((k, id(v), v._version) for k, v in source.items()))
    path = Path(source)
    try:
        status = path.stat()
    except OSError as error:
        raise FormatError(f"LoRA {str(path)!r}: no such file ({error.strerror})") from error
    return str(path.resolve()), status.st_mtime_ns, status.st_size


def read_lora(source: LoraSource) -> LoraFile:
    """Reads a state dict, a safetensors or torch file, or a folder that PEFT or diffusers wrote.

    FormatError when it is damaged or holds no tensors.
    """
    if isinstance(source, Mapping):
        bad = [key for key, value in source.items() if not isinstance(value, Tensor)]
        if bad:
            raise FormatError(
                f"a LoRA state dict: {bad[0]!r} is a {type(source[bad[0]]).__name__}, no tensor"
            )
        return LoraFile("a LoRA state dict", source)
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise FormatError(f"LoRA {str(path)!r}: no such file")
    label = repr(str(path))
    if path.suffix in TORCH_SUFFIXES:
        return LoraFile(label, read_torch_file(path), _config_beside(path))
    tensors, metadata = read_header(path.resolve())
    found = {name: stored.read() for name, stored in tensors.items()}
    config = _config_within(metadata, label) or _config_beside(path)
    return LoraFile(label, found, config, _file_alpha(metadata, label))


def _in_folder(folder: Path) -> Path:
    for name in _ADAPTER_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found[:4]) or "none"
    raise FormatError(f"LoRA folder {str(folder)!r}: expected one .safetensors, found {names}")


def _config_beside(path: Path) -> dict[str, Any]:
    """PEFT's configuration, where the file is one that PEFT names so."""
    config = path.parent / _CONFIG_NAME
    if path.name not in _ADAPTER_NAMES or not config.is_file():
        return {}
    try:
        read = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{str(config)!r} cannot be read: {error}") from error
    return read if isinstance(read, dict) else {}


def _config_within(metadata: Mapping[str, str], label: str) -> dict[str, Any]:
    """The configuration that diffusers puts into metadata, its keys under the part's name."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        read = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{label}: its lora_adapter_metadata is no JSON ({error})") from error
    if not isinstance(read, dict):
        return {}
    inner: dict[str, Any] = {}
    for key, value in read.items():
        inner[key.split(".", 1)[1] if "." in key else key] = value
    return inner


def _file_alpha(metadata: Mapping[str, str], label: str) -> float | None:
    """`lora_alpha` as plain metadata (kohya's `ss_network_alpha` is in the file's own alphas)."""
    try:
        return float(metadata["lora_alpha"]) if "lora_alpha" in metadata else None
    except ValueError as error:
        raise FormatError(f"{label}: lora_alpha is not a number ({error})") from error
