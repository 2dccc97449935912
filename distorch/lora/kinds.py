"""What a patch adds to a weight, kind by kind.

Every kind has `delta(weight)`: what it adds at strength 1 to a weight that is given in the dtype of
the arithmetic (float64 where the device has it), same shape. Low-rank kinds also have factors,
which the merge kernel takes as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distorch.errors import FormatError


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(like.device, like.dtype)


class Kind:
    """One LoRA's part for one weight (or for some rows of it)."""

    name = "patch"

    def delta(self, weight: Tensor) -> Tensor:
        """What strength 1 adds to `weight` (float32 or float64), same shape."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up [rows, rank], down [rank, columns]), float32, if up @ down is what is added."""
        return None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of that shape."""
        raise NotImplementedError

    def shape(self) -> str:
        """The shape that it was made for, in words."""
        raise NotImplementedError

    def rows(self) -> int | None:
        """Rows that it covers, where that is known without the weight."""
        return None

    @property
    def cuts(self) -> int:
        """Rows come in groups of this many, each of which can be patched alone; 0: only all."""
        return 0

    def some_rows(self, begin: int, end: int) -> Kind:
        """The part of it for rows [begin, end): a fused patch on one of several weights, or some
        of a big one. Both are multiples of `cuts`.
        """
        step = self.cuts
        if step == 0 or begin % step or end % step:
            raise FormatError(
                f"a {self.name} cannot be cut at rows {begin} to {end}"
                + (f", only at multiples of {step}" if step else "")
            )
        return self._rows_of(begin, end)

    def _rows_of(self, begin: int, end: int) -> Kind:
        raise NotImplementedError


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


@dataclass(eq=False)
class LowRankKind(Kind):
    """scale * up @ down; `up` [rows, rank], `down` [rank, columns], any floating dtype."""

    up: Tensor
    down: Tensor
    scale: float
    name = "LoRA"

    def __post_init__(self) -> None:
        # float32 once; the scale goes with the strength, which the kernel multiplies by.
        self.up = self.up.detach().flatten(1).float().contiguous()
        self.down = self.down.detach().flatten(1).float().contiguous()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def delta(self, weight: Tensor) -> Tensor:
        product = (_as(self.up, weight) @ _as(self.down, weight)) * self.scale
        return product.reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and (self.up.shape[0], self.down.shape[1]) == (
            shape[0],
            _columns(shape),
        )

    def transposed(self) -> LowRankKind:
        """The same for a module that keeps its weight the other way round."""
        return LowRankKind(self.down.t(), self.up.t(), self.scale)

    def shape(self) -> str:
        return f"[{self.up.shape[0]}, {self.down.shape[1]}] of rank {self.up.shape[1]}"

    def rows(self) -> int:
        return int(self.up.shape[0])

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> LowRankKind:
        return LowRankKind(self.up[begin:end], self.down, self.scale)


@dataclass(eq=False)
class CoreKind(Kind):
    """LoRA of a convolution with a core between its factors (`lora_mid`), in Tucker's form.

    `core` [rank, rank, ...], `up` [rows, rank], `down` [rank, channels].
    """

    core: Tensor
    up: Tensor
    down: Tensor
    scale: float
    name = "LoRA"

    def delta(self, weight: Tensor) -> Tensor:
        core, up, down = (_as(t, weight) for t in (self.core, self.up, self.down))
        product = _tucker(core, up.flatten(1).t(), down.flatten(1))
        return (product * self.scale).reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = (self.up.shape[0], self.down.shape[1] * math.prod(self.core.shape[2:]))
        return len(shape) > 1 and size == (shape[0], _columns(shape))

    def shape(self) -> str:
        return str([self.up.shape[0], self.down.shape[1], *self.core.shape[2:]])

    def rows(self) -> int:
        return int(self.up.shape[0])

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> CoreKind:
        return replace(self, up=self.up[begin:end])


@dataclass(eq=False)
class HadamardKind(Kind):
    """LoHa: scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; with cores for convolutions."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    cores: tuple[Tensor, Tensor] | None
    scale: float
    name = "LoHa"

    def delta(self, weight: Tensor) -> Tensor:
        if self.cores is None:
            sides = [_as(a, weight) @ _as(b, weight) for a, b in (self.first, self.second)]
        else:
            sides = [
                _tucker(_as(core, weight), _as(a, weight), _as(b, weight))
                for core, (a, b) in zip(self.cores, (self.first, self.second), strict=True)
            ]
        return (sides[0] * sides[1] * self.scale).reshape(weight.shape)

    def _size(self) -> tuple[int, int]:
        (a, b), core = self.first, self.cores
        if core is None:
            return a.shape[0], b.shape[1]
        return a.shape[1], b.shape[1] * math.prod(core[0].shape[2:])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self._size() == (shape[0], _columns(shape))

    def shape(self) -> str:
        return str(list(self._size()))

    def rows(self) -> int:
        return self._size()[0]

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> HadamardKind:
        rows = slice(begin, end)
        place = rows if self.cores is None else (slice(None), rows)
        (a, b), (c, d) = self.first, self.second
        return replace(self, first=(a[place], b), second=(c[place], d))


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """core [r, s, ...], up [r, out], down [s, in] -> [out, in, ...]."""
    return torch.einsum("ij...,ip,jr->pr...", core, up, down)


@dataclass(eq=False)
class KroneckerKind(Kind):
    """LoKr: scale * kron(left, right), each side a matrix or a product of two."""

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    core: Tensor | None  # of the right side: right[0] [r, c], right[1] [s, d]
    scale: float
    name = "LoKr"

    def delta(self, weight: Tensor) -> Tensor:
        left = _product(self.left, weight)
        right = (
            _product(self.right, weight)
            if self.core is None
            else _tucker(_as(self.core, weight), *(_as(f, weight) for f in self.right))
        )
        while left.dim() < right.dim():
            left = left.unsqueeze(-1)
        return (torch.kron(left, right) * self.scale).reshape(weight.shape)

    def _count(self) -> int:
        return math.prod(_product_shape(self.left)) * (
            math.prod(_product_shape(self.right))
            if self.core is None
            else self.right[0].shape[1] * self.right[1].shape[1] * math.prod(self.core.shape[2:])
        )

    @property
    def cuts(self) -> int:
        return int(self.right[0].shape[0 if self.core is None else 1])

    def _rows_of(self, begin: int, end: int) -> KroneckerKind:
        left = self.left[0][begin // self.cuts : end // self.cuts]
        return replace(self, left=(left, *self.left[1:]))

    def rows(self) -> int:
        return int(self.left[0].shape[0] * self.cuts)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self.rows() == shape[0] and self._count() == math.prod(shape)

    def shape(self) -> str:
        return f"[{self.rows()}, {self._count() // max(self.rows(), 1)}]"


def _product(factors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    parts = [_as(factor, like) for factor in factors]
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def _product_shape(factors: tuple[Tensor, ...]) -> tuple[int, ...]:
    if len(factors) == 1:
        return tuple(factors[0].shape)
    return (factors[0].shape[0], *factors[1].shape[1:])


@dataclass(eq=False)
class DifferenceKind(Kind):
    """A full difference, added as it is: `diff`, `diff_b`, biases, norms."""

    value: Tensor
    scale: float = 1.0
    name = "difference"

    def delta(self, weight: Tensor) -> Tensor:
        return (_as(self.value, weight) * self.scale).reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.value.shape) == shape or (
            self.value.numel() == math.prod(shape) and 1 in (len(shape), self.value.dim())
        )

    def shaped(self, shape: tuple[int, ...]) -> DifferenceKind:
        """The same in the shape of its weight, where it was flattened."""
        return replace(self, value=self.value.reshape(shape)) if self.fits(shape) else self

    def shape(self) -> str:
        return str(list(self.value.shape))

    def rows(self) -> int:
        return int(self.value.shape[0])

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> DifferenceKind:
        return DifferenceKind(self.value[begin:end], self.scale)


@dataclass(eq=False)
class ReplacementKind(Kind):
    """`set_weight`: at strength 1 the weight is this value, whatever it was."""

    value: Tensor
    name = "replacement"

    def delta(self, weight: Tensor) -> Tensor:
        return _as(self.value, weight).reshape(weight.shape) - weight

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.value.shape) == shape

    def shape(self) -> str:
        return str(list(self.value.shape))

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> ReplacementKind:
        return ReplacementKind(self.value[begin:end])


@dataclass(eq=False)
class GloraKind(Kind):
    """GLoRA: scale * (weight @ a_in @ a_out + b_out @ b_in)."""

    a: tuple[Tensor, Tensor]  # [channels, rank], [rank, channels]
    b: tuple[Tensor, Tensor]  # [rows, rank], [rank, columns]
    scale: float
    name = "GLoRA"

    def delta(self, weight: Tensor) -> Tensor:
        mix = _as(self.a[0], weight) @ _as(self.a[1], weight)  # [channels, channels]
        mixed = torch.einsum("oi...,ij->oj...", weight, mix)
        added = (_as(self.b[0], weight) @ _as(self.b[1], weight)).reshape(weight.shape)
        return (mixed + added) * self.scale

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = (self.b[0].shape[0], self.b[1].shape[1])
        mix = (self.a[0].shape[0], self.a[1].shape[1])
        return (
            len(shape) > 1 and size == (shape[0], _columns(shape)) and mix == (shape[1], shape[1])
        )

    def shape(self) -> str:
        return f"[{self.b[0].shape[0]}, {self.b[1].shape[1]}]"

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> GloraKind:
        return replace(self, b=(self.b[0][begin:end], self.b[1]))


def _skew(vectors: Tensor, size: int) -> Tensor:
    """[blocks, size * (size - 1) / 2] -> skew-symmetric [blocks, size, size]."""
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(vectors.shape[0], size, size)
    upper[:, rows, columns] = vectors
    return upper - upper.transpose(-2, -1)


def _cayley(skew: Tensor) -> Tensor:
    """(I - Q)^-1 applied from the right to (I + Q): a rotation of each block."""
    one = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    rotated: Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
    return rotated


@dataclass(eq=False)
class RotationKind(Kind):
    """OFT and BOFT as LyCORIS writes them: blocks of output rows are rotated.

    `blocks` [blocks, size, size] (OFT) or [stages, blocks, size, size] (BOFT); `rescale` per row;
    a `constraint` above 0, times the rows, bounds the norm of what is rotated by.
    """

    blocks: Tensor
    rescale: Tensor | None
    constraint: float
    name = "OFT"

    def delta(self, weight: Tensor) -> Tensor:
        raw = _as(self.blocks, weight)
        skew = raw - raw.transpose(-2, -1)
        if self.constraint > 0:
            norm, bound = torch.linalg.vector_norm(skew) + 1e-8, self.constraint * self.rows()
            if norm > bound:
                skew = skew * (bound / norm)
        rotation = _cayley(skew)
        flat = weight.flatten(1)
        if rotation.dim() == 3:
            parts = flat.view(rotation.shape[0], -1, flat.shape[1])
            result = torch.einsum("knm,kn...->km...", rotation, parts).reshape(flat.shape)
        else:
            result = _butterfly(rotation, flat)
        if self.rescale is not None:
            result = result * _as(self.rescale, weight).reshape(-1, 1)
        return (result - flat).reshape(weight.shape)

    def rows(self) -> int:
        return int(self.blocks.shape[-3] * self.blocks.shape[-1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self.rows() == shape[0]

    def shape(self) -> str:
        return f"{self.rows()} rows"


def _butterfly(rotation: Tensor, flat: Tensor) -> Tensor:
    """Stage i rotates rows that lie 2^i half blocks apart."""
    size = rotation.shape[-1]
    for stage, turn in enumerate(rotation):
        apart = 2**stage * (size // 2)
        gathered = flat.reshape(-1, 2, apart, flat.shape[1]).transpose(1, 2).flatten(0, 2)
        turned = torch.einsum("bij,bj...->bi...", turn, gathered.view(-1, size, flat.shape[1]))
        flat = turned.reshape(-1, apart, 2, flat.shape[1]).transpose(1, 2).flatten(0, 2)
    return flat


@dataclass(eq=False)
class InputRotationKind(Kind):
    """OFT as PEFT writes it: `vectors` [blocks, size * (size - 1) / 2] rotate blocks of columns.

    `terms` of the Neumann series that stands for the inverse, as in PEFT; 0: the inverse itself.
    """

    vectors: Tensor
    terms: int
    name = "OFT"

    def _block(self) -> int:
        return int(1 + math.isqrt(1 + 8 * self.vectors.shape[1])) // 2

    def delta(self, weight: Tensor) -> Tensor:
        size = self._block()
        skew = _skew(_as(self.vectors, weight), size)
        rotation = _cayley(-skew) if self.terms == 0 else _neumann(skew, self.terms)
        flat = weight.flatten(1)
        blocks = flat.shape[1] // size
        rotation = rotation.expand(blocks, size, size)
        turned = torch.einsum("rbj,bij->rbi", flat.reshape(-1, blocks, size), rotation)
        return (turned.flatten(1) - flat).reshape(weight.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = self._block()
        if len(shape) < 2 or size < 1 or _columns(shape) % size:
            return False
        return self.vectors.shape[0] in (1, _columns(shape) // size)

    def shape(self) -> str:
        return f"{self.vectors.shape[0]} blocks of {self._block()} columns"

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> InputRotationKind:
        return self  # the same for every row


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """1 + 2 Q + 2 Q^2 + ... + Q^(terms - 1): the first terms of (1 + Q)(1 - Q)^-1."""
    result = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).repeat(
        skew.shape[0], 1, 1
    )
    if terms > 1:
        result = result + 2 * skew
    if terms > 2:
        power = skew @ skew
        result = result + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            result = result + 2 * power
        result = result + power @ skew
    return result


@dataclass(eq=False)
class InputButterflyKind(Kind):
    """BOFT as PEFT writes it: `rotations` [stages, blocks, size, size], `scales` per output row."""

    rotations: Tensor
    scales: Tensor
    name = "BOFT"

    def delta(self, weight: Tensor) -> Tensor:
        raw = _as(self.rotations, weight)
        turned = _cayley(0.5 * (raw - raw.transpose(-2, -1)).neg())
        flat = weight.flatten(1)
        result = flat.t()
        for stage, blocks in enumerate(turned):
            order = self._order(stage, flat.shape[1]).to(flat.device)
            back = torch.empty_like(order)
            back[order] = torch.arange(order.numel(), device=order.device)
            inner = result[back].view(blocks.shape[0], -1, flat.shape[0])
            result = torch.einsum("bij,bj...->bi...", blocks, inner).flatten(0, 1)[order]
        result = result.t() * _as(self.scales, weight).reshape(-1, 1)
        return (result - flat).reshape(weight.shape)

    def _order(self, stage: int, columns: int) -> Tensor:
        stages, blocks, size, _ = self.rotations.shape
        order = torch.arange(columns)
        if stages == 1:
            return order
        half, length = size // 2, columns // (blocks // 2**stage)
        groups = torch.arange(length).view(-1, half)
        inner = torch.cat((groups[0::2], groups[1::2])).flatten()
        return order.view(-1, length)[:, inner].flatten()

    def fits(self, shape: tuple[int, ...]) -> bool:
        columns = self.rotations.shape[1] * self.rotations.shape[2]
        return len(shape) > 1 and _columns(shape) == columns and self.scales.numel() == shape[0]

    def shape(self) -> str:
        return f"[{self.scales.numel()}, {self.rotations.shape[1] * self.rotations.shape[2]}]"

    cuts = 1

    def _rows_of(self, begin: int, end: int) -> InputButterflyKind:
        return replace(self, scales=self.scales.flatten()[begin:end])


@dataclass(eq=False)
class DecomposedKind(Kind):
    """DoRA: magnitude * (weight + inner) / norm(weight + inner), per output row or per column."""

    inner: Kind
    magnitude: Tensor
    name = "DoRA"

    def delta(self, weight: Tensor) -> Tensor:
        moved = weight + self.inner.delta(weight)
        magnitude = _as(self.magnitude, weight).flatten()
        by_row = magnitude.numel() == weight.shape[0] and not self._says_columns(weight)
        kept = 0 if by_row else 1
        others = [dim for dim in range(weight.dim()) if dim != kept]
        norm: Tensor = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        return moved * (magnitude.reshape(norm.shape) / norm) - weight

    def _says_columns(self, weight: Tensor) -> bool:
        shape = self.magnitude.shape
        return len(shape) > 1 and shape[0] == 1 and shape[1] == weight.shape[1] > 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.inner.fits(shape) and self.magnitude.numel() in shape[:2]

    def shape(self) -> str:
        return self.inner.shape()

    def rows(self) -> int | None:
        return self.inner.rows()

    def transposed(self) -> DecomposedKind:
        """The same for a module that keeps its weight the other way round."""
        if not isinstance(self.inner, LowRankKind):
            raise FormatError("a DoRA over anything but LoRA cannot be turned over")
        return DecomposedKind(self.inner.transposed(), self.magnitude.reshape(1, -1))

    @property
    def cuts(self) -> int:
        shape, inner = self.magnitude.shape, self.inner
        by_column = len(shape) > 1 and shape[0] == 1 < shape[1]
        if by_column and isinstance(inner, LowRankKind):
            by_column = inner.down.shape[1] % shape[1] == 0
        by_row = self.magnitude.numel() == self.rows() and not by_column
        return inner.cuts if by_row else 0

    def _rows_of(self, begin: int, end: int) -> DecomposedKind:
        magnitude = self.magnitude.flatten()
        return DecomposedKind(self.inner.some_rows(begin, end), magnitude[begin:end])


@dataclass(frozen=True)
class Scaling:
    """How strong a patch is at strength 1: alpha / rank, or alpha / sqrt(rank).

    `alpha` None: the factors have their scale in them. `rank` is the configured one, for kinds
    whose factors do not show it. `terms` of the series that PEFT's OFT uses (0: exact).
    """

    alpha: float | None = None
    rank: int | None = None
    rank_root: bool = False
    terms: int = 0

    def of(self, rank: int | None) -> float:
        """The factor for factors of that rank (None: they do not show it)."""
        known = self.rank if rank is None else rank
        if self.alpha is None or known is None:
            return 1.0
        return self.alpha / math.sqrt(known) if self.rank_root else self.alpha / known


def make_kind(parts: Mapping[str, Tensor], scaling: Scaling) -> Kind:
    """The kind that these parts of one target make up. FormatError when one is missing."""
    kind = _additive(parts, scaling)
    if kind is None and ("up" in parts) != ("down" in parts):
        raise FormatError("it has no second factor: a LoRA is a product of two")
    if kind is None:
        raise FormatError(f"its parts {sorted(parts)} make up no patch that is known")
    if "magnitude" in parts:
        return DecomposedKind(kind, parts["magnitude"])
    return kind


def _additive(parts: Mapping[str, Tensor], scaling: Scaling) -> Kind | None:
    for needed, make in _MAKERS:
        if all(part in parts for part in needed):
            return make(parts, scaling)
    if any(part.startswith("lokr_") for part in parts):
        return _kronecker(parts, scaling)
    return None


def _hadamard(parts: Mapping[str, Tensor], scaling: Scaling) -> HadamardKind:
    cores = None
    if "hada_t1" in parts and "hada_t2" in parts:
        cores = parts["hada_t1"], parts["hada_t2"]
    first, second = ((parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
    return HadamardKind(first, second, cores, scaling.of(first[1].shape[0]))


def _low_rank(parts: Mapping[str, Tensor], scaling: Scaling) -> Kind:
    up, down = parts["up"], parts["down"]
    if up.dim() < 2 or down.dim() < 2 or up.shape[1] != down.shape[0]:
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


_MAKERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Tensor], Scaling], Kind]], ...] = (
    (("down", "up"), _low_rank),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _hadamard),
    (("a1", "a2", "b1", "b2"), _glora),
    (
        ("oft_blocks",),
        lambda parts, s: RotationKind(parts["oft_blocks"], parts.get("rescale"), s.alpha or 0.0),
    ),
    (("oft_r",), lambda parts, scaling: InputRotationKind(parts["oft_r"], scaling.terms)),
    (
        ("boft_r", "boft_s"),
        lambda parts, scaling: InputButterflyKind(parts["boft_r"], parts["boft_s"]),
    ),
    (("set_weight",), lambda parts, scaling: ReplacementKind(parts["set_weight"])),
    (("diff",), lambda parts, scaling: DifferenceKind(parts["diff"])),
)
