# SPDX-License-Identifier: Apache-2.0
"""Which kind of patch the parts of one target make up."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from distorch.errors import FormatError
from distorch.lora.around import DecomposedKind
from distorch.lora.kinds import DifferenceKind, Kind, ReplacementKind
from distorch.lora.products import (
    CoreKind,
    GloraKind,
    HadamardKind,
    KroneckerKind,
    LowRankKind,
)
from distorch.lora.rotations import InputButterflyKind, InputRotationKind, RotationKind


@dataclass(frozen=True)
class Scaling:
    """How strong a patch is at strength 1: alpha / rank, or alpha / sqrt(rank).

    `alpha` None: the factors have their scale in them. `rank` is the configured one: of kinds whose
    factors show it, it has to be the same. `terms` of the series that PEFT's OFT uses (0: exact).
    """

    alpha: float | None = None
    rank: int | None = None
    rank_root: bool = False
    terms: int = 0

    def of(self, rank: int | None) -> float:
        """The factor for factors of that rank (None: they do not show it). FormatError if it is
        another than the configured one, on which the scale depends.
        """
        known = self.rank if rank is None else rank
        if known is not None and known < 1:
            raise FormatError(f"its rank is {known}; expected 1 or more")
        if self.alpha is not None and rank is not None and self.rank not in (None, rank):
            raise FormatError(f"its configuration says r={self.rank}, its factors have rank {rank}")
        if self.alpha is None or known is None:
            return 1.0
        return self.alpha / math.sqrt(known) if self.rank_root else self.alpha / known


def make_kind(parts: Mapping[str, Tensor], scaling: Scaling) -> Kind:
    """The kind that these parts of one target make up. FormatError when one is missing, or has
    another number of dimensions than its name says.
    """
    for part, (least, most) in _DIMENSIONS.items():
        if part in parts and not least <= parts[part].dim() <= most:
            raise FormatError(
                f"the shape of its factor {part} is {list(parts[part].shape)}; expected {least} to "
                f"{most} dimensions"
            )
    kind = _additive(parts, scaling)
    if kind is None and ("up" in parts) != ("down" in parts):
        raise FormatError("it has no second factor: a LoRA is a product of two")
    if kind is None:
        raise FormatError(f"its parts {sorted(parts)} make up no patch that is known")
    if "magnitude" in parts:
        return DecomposedKind(kind, parts["magnitude"])
    return kind


def _additive(parts: Mapping[str, Tensor], scaling: Scaling) -> Kind | None:
    for needed, optional, make in _MAKERS:
        if all(part in parts for part in needed):
            _check_all_used(parts, {*needed, *optional})
            return make(parts, scaling)
    if any(part.startswith("lokr_") for part in parts):
        _check_all_used(parts, {part for part in parts if part.startswith("lokr_")})
        return _kronecker(parts, scaling)
    return None


def _check_all_used(parts: Mapping[str, Tensor], used: Collection[str]) -> None:
    """FormatError if a part is left over: it is of another patch, or of a kind that is new."""
    rest = sorted(parts.keys() - {*used, "magnitude"})
    if rest:
        raise FormatError(
            f"it has {rest} beside {sorted(set(used) & parts.keys())}: no kind of LoRA has both"
        )


def _hadamard(parts: Mapping[str, Tensor], scaling: Scaling) -> HadamardKind:
    cores = None
    if "hada_t1" in parts and "hada_t2" in parts:
        cores = parts["hada_t1"], parts["hada_t2"]
    first, second = ((parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
    return HadamardKind(first, second, cores, scaling.of(first[1].shape[0]))


def _low_rank(parts: Mapping[str, Tensor], scaling: Scaling) -> Kind:
    up, down = parts["up"], parts["down"]
    if up.dim() < 2 or down.dim() < 2 or math.prod(up.shape[1:]) != down.shape[0]:
        raise FormatError(
            f"factors of {tuple(up.shape)} and {tuple(down.shape)} do not make a product"
        )
    scale = scaling.of(down.shape[0])
    if "mid" in parts:
        return CoreKind(parts["mid"], up, down, scale)
    return LowRankKind(up, down, scale)


def _kronecker(parts: Mapping[str, Tensor], scaling: Scaling) -> KroneckerKind:
    sides: list[tuple[Tensor, ...]] = []
    rank: int | None = None
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts and not {f"{side}_a", f"{side}_b"}.isdisjoint(parts):
            raise FormatError(f"a LoKr has {side} whole and as two factors; expected one of both")
        if side in parts:
            sides.append((parts[side],))
        elif f"{side}_a" in parts and f"{side}_b" in parts:
            sides.append((parts[f"{side}_a"], parts[f"{side}_b"]))
            rank = int(parts[f"{side}_b"].shape[0])
        else:
            raise FormatError(f"a LoKr without {side}, or one of its two factors")
    return KroneckerKind(sides[0], sides[1], parts.get("lokr_t2"), scaling.of(rank))


def _glora(parts: Mapping[str, Tensor], scaling: Scaling) -> GloraKind:
    a1, a2, b1, b2 = (parts[name].detach().flatten(1) for name in ("a1", "a2", "b1", "b2"))
    # LyCORIS applies a2 and b2 first; older files have it the other way round.
    if a1.shape[0] < a1.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    return GloraKind((a1, a2), (b1, b2), scaling.of(a1.shape[1]))


# How many dimensions the parts have: 2 of matrices, more where convolutions bring their own.
_MATRIX, _CONVOLUTION = (2, 2), (2, 5)
_DIMENSIONS = {
    "mid": (3, 5), "oft_blocks": (3, 4), "oft_r": _MATRIX, "boft_r": (4, 4),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _MATRIX),
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t2", "a1", "a2", "b1", "b2"), _CONVOLUTION),
    **dict.fromkeys(("lokr_w1", "lokr_w2", "lokr_w2_b", "lokr_w1_b"), _CONVOLUTION),
    **dict.fromkeys(("lokr_w1_a", "lokr_w2_a"), _MATRIX),
}  # fmt: skip
_Make = Callable[[Mapping[str, Tensor], Scaling], Kind]
# The parts that make a kind, those that it may have, and what makes it.
_MAKERS: tuple[tuple[tuple[str, ...], tuple[str, ...], _Make], ...] = (
    (("down", "up"), ("mid",), _low_rank),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2"), _hadamard),
    (("a1", "a2", "b1", "b2"), (), _glora),
    (
        ("oft_blocks",),
        ("rescale",),
        lambda parts, s: RotationKind(parts["oft_blocks"], parts.get("rescale"), s.alpha or 0.0),
    ),
    (("oft_r",), (), lambda parts, scaling: InputRotationKind(parts["oft_r"], scaling.terms)),
    (
        ("boft_r", "boft_s"),
        (),
        lambda parts, scaling: InputButterflyKind(parts["boft_r"], parts["boft_s"]),
    ),
    (("set_weight",), (), lambda parts, scaling: ReplacementKind(parts["set_weight"])),
    (("diff",), (), lambda parts, scaling: DifferenceKind(parts["diff"])),
)
