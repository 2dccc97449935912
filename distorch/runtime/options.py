"""The options of `distribute`: their defaults, and what is refused before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distorch.errors import SpecError
from distorch.planner import parse_bytes, parse_spec


@dataclass
class Options:
    """The options of `distribute`, as documented there."""

    compute: str | torch.device | None = None
    order: str = "interleaved"
    min_bytes: int = 1 << 20
    keep: Sequence[str] = ()
    offload: Sequence[str] = ()
    rules: Sequence[tuple[str, str]] = ()
    prefetch: int | str = "auto"
    compress: str = "auto"

    def __post_init__(self) -> None:
        self.keep = (self.keep,) if isinstance(self.keep, str) else self.keep
        self.offload = (self.offload,) if isinstance(self.offload, str) else self.offload

    def check(self) -> None:
        """Raises SpecError on values outside their meaning."""
        if self.compress not in ("auto", "never"):
            raise SpecError(
                f"compress={self.compress!r}: this version sends weights as they are; "
                "expected 'auto' or 'never'"
            )
        if self.prefetch != "auto":
            parse_bytes(self.prefetch)
        if not _is_count(self.min_bytes):
            raise SpecError(f"min_bytes={self.min_bytes!r}: expected a whole number of bytes, >= 0")
        for name, patterns in (("keep", self.keep), ("offload", self.offload)):
            if not _all_strings(patterns):
                raise SpecError(
                    f"{name}={patterns!r}: expected name patterns, such as ['blocks.0.*']"
                )
        if not _is_sequence(self.rules) or not all(_is_rule(rule) for rule in self.rules):
            raise SpecError(
                f"rules={self.rules!r}: expected (pattern, device) pairs, such as "
                "[('blocks.0.*', 'cpu')]"
            )


def compute_device(name: object, what: str = "compute") -> str:
    """ "cuda" -> "cuda:0". SpecError when it is no device, or none that computes."""
    if isinstance(name, torch.device) and name.type != "meta":
        return "cpu" if name.type == "cpu" else f"{name.type}:{name.index or 0}"
    text = name if isinstance(name, str) else ""
    try:
        device = parse_spec(f"{text},*").entries[0].device
    except SpecError as error:
        raise SpecError(
            f"{what}={name!r} is not a device that computes; expected 'cpu' or an accelerator, "
            "such as 'cuda:0'"
        ) from error
    if device == "disk" or "+" in device:
        raise SpecError(f"{what}={name!r}: that cannot compute; expected 'cpu' or an accelerator")
    return device


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _all_strings(values: Any) -> bool:
    kinds = isinstance(values, set | frozenset) or _is_sequence(values)
    return kinds and all(isinstance(value, str) for value in values)


def _is_rule(rule: Any) -> bool:
    return _is_sequence(rule) and len(rule) == 2 and _all_strings(rule)
