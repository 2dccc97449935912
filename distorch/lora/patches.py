"""PEFT-spelled LoRA factors as patches on a module's weights.

The result is defined: W' = round_once(float32(W) + sum of strength * (alpha / rank) * B @ A), in
the order given, computed in float32.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distorch import _ops
from distorch.errors import FormatError
from distorch.formats.safetensors import read_header

LoraSource = str | os.PathLike[str] | Mapping[str, Tensor]

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "")
_DOWN = (".lora_A.default.weight", ".lora_A.weight", ".lora_down.weight")
_UP = (".lora_B.default.weight", ".lora_B.weight", ".lora_up.weight")


@dataclass(frozen=True)
class Patch:
    """strength * up @ down on one weight: `down` [rank, in], `up` [out, rank], any float dtype."""

    weight: str
    down: Tensor
    up: Tensor
    scale: float


@dataclass
class Patches:
    """Patches by weight name, each list in the order given."""

    by_weight: dict[str, list[Patch]] = field(default_factory=dict)

    def touches(self, names: Sequence[str]) -> bool:
        """Whether any name of a weight is patched."""
        return any(name in self.by_weight for name in names)

    def apply(self, names: Sequence[str], weight: Tensor) -> Tensor:
        """The patched weight, same shape and dtype, rounded to nearest even once."""
        result = weight.float()
        for patch in (p for name in names for p in self.by_weight.get(name, ())):
            if patch.up.shape[0] != weight.shape[0] or patch.down.shape[1] != weight[0].numel():
                raise FormatError(
                    f"LoRA for {patch.weight!r}: {tuple(patch.up.shape)} @ "
                    f"{tuple(patch.down.shape)} does not give the weight's shape "
                    f"{tuple(weight.shape)}; it was made for another model"
                )
            up = patch.up.to(weight.device, torch.float32)
            delta = (up @ patch.down.to(weight.device, torch.float32)).reshape(weight.shape)
            if not bool(torch.isfinite(delta).all()):
                raise FormatError(f"LoRA for {patch.weight!r}: its delta has NaN or inf values")
            result += patch.scale * delta
        return result.to(weight.dtype)


def read_loras(
    loras: Sequence[tuple[LoraSource, float]], names: Sequence[str], strict: bool = True
) -> Patches:
    """Reads LoRAs and resolves their keys against the module's parameter names.

    FormatError when a file is damaged or none of its keys fits; with `strict` also when some do
    not, otherwise these are named in a warning.
    """
    patches = Patches()
    for source, strength in loras:
        label = "a LoRA state dict" if isinstance(source, Mapping) else repr(str(source))
        for patch in _resolve(_read(source), strength, names, label, strict):
            patches.by_weight.setdefault(patch.weight, []).append(patch)
    return patches


def _read(source: LoraSource) -> tuple[Mapping[str, Tensor], float | None]:
    """Factors by key, and the alpha of the whole file if it says one."""
    if isinstance(source, Mapping):
        return source, None
    path = Path(source)
    if not path.is_file():
        raise FormatError(f"LoRA {str(path)!r}: no such file")
    tensors, metadata = read_header(path.resolve())
    found = {}
    for name, stored in tensors.items():
        found[name] = torch.empty(stored.shape, dtype=stored.dtype)
        if stored.nbytes:
            _ops.read_file(stored.path, stored.offset, found[name])
    return found, _file_alpha(metadata)


def _file_alpha(metadata: Mapping[str, str]) -> float | None:
    """`lora_alpha` as plain metadata, or inside a JSON config (`lora_adapter_metadata`)."""
    try:
        if "lora_alpha" in metadata:
            return float(metadata["lora_alpha"])
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return float(config["lora_alpha"]) if "lora_alpha" in config else None
    except (ValueError, TypeError) as error:
        raise FormatError(f"LoRA metadata: lora_alpha is not a number ({error})") from error


def _resolve(
    read: tuple[Mapping[str, Tensor], float | None],
    strength: float,
    names: Sequence[str],
    label: str,
    strict: bool,
) -> list[Patch]:
    tensors, file_alpha = read
    known = set(names)
    patches, unmatched = [], []
    for key, down in tensors.items():
        suffix = next((s for s in _DOWN if key.endswith(s)), None)
        if suffix is None:
            continue
        stem = key.removesuffix(suffix)
        up = tensors.get(stem + _UP[_DOWN.index(suffix)])
        if up is None:
            raise FormatError(f"{label}: {key!r} has no second factor")
        target = next(
            (
                n
                for p in _PREFIXES
                if stem.startswith(p) and (n := stem[len(p) :] + ".weight") in known
            ),
            None,
        )
        if target is None:
            unmatched.append(stem)
            continue
        alpha = tensors.get(stem + ".alpha")
        rank = down.shape[0]
        numerator = float(alpha) if alpha is not None else file_alpha
        scale = strength * (1.0 if numerator is None else numerator / rank)
        patches.append(Patch(target, down, up, scale))
    if unmatched or not patches:
        shown = (unmatched or list(tensors))[:3]
        counts = (len(unmatched), len(patches) + len(unmatched))
        _complain(
            f"{label}: {counts[0]} of its {counts[1]} LoRA targets fit no weight (as {shown}); "
            f"the module has names as {list(names)[:3]}",
            fatal=strict or not patches,
        )
    return patches


def _complain(message: str, *, fatal: bool) -> None:
    if fatal:
        raise FormatError(f"{message}; strict_loras=False skips single keys")
    warnings.warn(message, stacklevel=5)
