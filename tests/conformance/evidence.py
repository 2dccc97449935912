# SPDX-License-Identifier: Apache-2.0
"""What a check saw: tensors, numbers and texts in lists and dictionaries, compared bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


def _parts(value: Any) -> Any:
    """A dataclass as a dictionary; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, dict)):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return value


def of(value: Any) -> Any:
    """The tensors in a model's output, copied; everything else is left out."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    value = _parts(value)
    if isinstance(value, dict):
        kept = {key: of(part) for key, part in value.items()}
        return {key: part for key, part in kept.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [part for part in map(of, value) if part is not None]
    return None


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of an output or of evidence, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    value = _parts(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, copied."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal, where a NaN equals a NaN at the same place."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    there = a.isnan()
    return torch.equal(there, b.isnan()) and torch.equal(a[~there], b[~there])


def difference(got: Any, wanted: Any, where: str = "") -> str | None:
    """The first place where two pieces of evidence differ, in words; None where nothing does."""
    if type(got) is not type(wanted):
        return f"{where}: {type(got).__name__} instead of {type(wanted).__name__}"
    if isinstance(wanted, torch.Tensor):
        return None if same_bits(got, wanted) else f"{where}: {_other(got, wanted)}"
    if isinstance(wanted, dict) and list(got) != list(wanted):
        odd = sorted(map(str, set(got) ^ set(wanted))) or ["another order"]
        return f"{where}: other keys: {', '.join(odd[:4])}"
    if isinstance(wanted, (list, tuple)) and len(got) != len(wanted):
        return f"{where}: {len(got)} parts instead of {len(wanted)}"
    if isinstance(wanted, (dict, list, tuple)):
        keys = list(wanted) if isinstance(wanted, dict) else range(len(wanted))
        pairs = ((f"{where}.{key}", got[key], wanted[key]) for key in keys)
        return next((found for w, a, b in pairs if (found := difference(a, b, w))), None)
    same = repr(got) == repr(wanted) if isinstance(wanted, float) else got == wanted
    return None if same else f"{where}: {str(got)[:60]!r} instead of {str(wanted)[:60]!r}"


def _other(got: torch.Tensor, wanted: torch.Tensor) -> str:
    facts = [f"{list(t.shape)} {t.dtype} {t.device}" for t in (got, wanted)]
    return "other numbers" if facts[0] == facts[1] else " instead of ".join(facts)
