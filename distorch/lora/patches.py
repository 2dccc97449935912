"""LoRAs resolved against a module's weights, and the merge that defines their result.

W' = round_once(float32(W) + sum of strength * delta), deltas in the order given, each computed in
float32 or better; rounded to nearest even once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distorch import _ops
from distorch.errors import FormatError, SpecError
from distorch.lora.assemble import Scaling, make_kind
from distorch.lora.families import Place, Shapes
from distorch.lora.files import LoraFile, LoraSource, identity_of, read_lora
from distorch.lora.kinds import DecomposedKind, DifferenceKind, Kind, LowRankKind
from distorch.lora.spellings import Group, group_keys
from distorch.lora.targets import Targets, component_of

_SHOWN = 3
# Of what is not low rank; a delta is then exact to the last bit of the sum in float32.
_WIDE = torch.float64
_WIDE_NUMBERS = 1 << 20  # of a weight, at one time


@dataclass(frozen=True, eq=False)
class Patch:
    """One LoRA's part for rows of one weight, from `first_row` on."""

    weight: str
    kind: Kind
    first_row: int
    part: bool  # of a fused weight: it may have fewer rows
    stem: str
    label: str

    def complaint(self, what: str) -> FormatError:
        """An error that names the patch."""
        return FormatError(
            f"{self.label}: {self.kind.name} for {self.weight!r} ({self.stem}): {what}"
        )


@dataclass(eq=False)
class ResolvedLora:
    """One file's patches on one module, and the keys that fit nothing."""

    label: str
    patches: list[Patch]
    unmatched: list[str]
    elsewhere: list[str]  # stems of other parts of the pipeline
    targets: int


class Patches:
    """What changes which weight: patches with their strengths, in the order given."""

    def __init__(self) -> None:
        self._by_weight: dict[str, list[tuple[Patch, float]]] = {}

    def add(self, lora: ResolvedLora, strength: float) -> None:
        """One more LoRA, after those that are there."""
        for patch in lora.patches:
            self._by_weight.setdefault(patch.weight, []).append((patch, strength))

    def of(self, names: Sequence[str]) -> list[tuple[Patch, float]]:
        """The patches of a weight with these names; those of strength 0 are none."""
        found = [entry for name in names for entry in self._by_weight.get(name, ())]
        return [(patch, strength) for patch, strength in found if strength != 0]


def are_low_rank(patches: Sequence[tuple[Patch, float]]) -> bool:
    """Whether the patches can be terms of the merge kernel."""
    return all(isinstance(patch.kind, LowRankKind) for patch, _ in patches)


def low_rank_terms(
    patches: Sequence[tuple[Patch, float]], *, kept: bool = False
) -> _ops.Terms | None:
    """The patches as terms of the merge kernel, or None where one of them is no product. `kept`:
    they are for more than one merge.
    """
    if not are_low_rank(patches):
        return None
    terms = _ops.Terms()
    for patch, strength in patches:
        kind = patch.kind
        assert isinstance(kind, LowRankKind)
        if kept:
            kind.keep_factors()
        terms.add(*kind.factors(), strength * kind.scale, patch.first_row)
    return terms


@dataclass(frozen=True)
class StoredRows:
    """How a weight is stored where that is not its own dtype: `code` and scales.

    `scales` float32 [grid rows, grid columns], one for `block` (rows, columns) elements.
    """

    code: str
    scales: Tensor | None = None
    block: tuple[int, int] = (1, 1)

    def whole_rows(self, shape: Sequence[int]) -> bool:
        """Whether each row of a weight of that shape has its own bytes."""
        return _ops.as_matrix(shape)[1] % _ops.block_elements(self.code) == 0


def merge(
    patches: Sequence[tuple[Patch, float]],
    stored: Tensor,
    dtype: torch.dtype,
    rows: StoredRows | None = None,
    *,
    shape: Sequence[int] | None = None,
    into: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """The patched weight, in `dtype`, on the device of `stored`. FormatError on NaN and inf.

    `shape` of the weight, where it is not that of `stored` (blocks).

    `stored` is the base: plain numbers, or scaled ones if `rows` says so. The result may be written
    to `into` (plain, contiguous, of its shape, dtype and device), or with `in_place` to `stored`.
    """
    if rows is None:
        rows = StoredRows(_ops.code_of(stored.dtype))
    sizes = tuple(stored.shape if shape is None else shape)
    if not rows.whole_rows(sizes):
        stored, rows = _plain(stored, rows, sizes), StoredRows("float32")
    terms = low_rank_terms(patches)
    kernel_dtype = dtype if dtype in _ops.DECODED_DTYPES else torch.float32
    if dtype.itemsize == 8 or stored.dtype.itemsize == 8 or stored.is_complex():
        terms = None
    if terms is None:
        return _merge_wide(patches, _plain(stored, rows, sizes), dtype)
    same = in_place and stored.dtype == dtype == kernel_dtype and rows.scales is None
    matrix = _ops.as_matrix(sizes)
    if into is None or into.dtype != kernel_dtype or into.device != stored.device:
        into = stored if same else _ops.empty_beside(stored, sizes, kernel_dtype)
    finite = torch.ones(1, dtype=torch.bool, device=stored.device)
    _ops.decode(
        into.view(matrix), stored, rows.code, scales=rows.scales, block=rows.block, terms=terms,
        finite=finite,
    )  # fmt: skip
    if not bool(finite):
        raise _not_finite(patches)
    return into.to(dtype)


def _plain(stored: Tensor, rows: StoredRows, shape: Sequence[int]) -> Tensor:
    """The numbers of a base, in float32 if they are not plain."""
    if rows.code == _ops.code_of(stored.dtype) and rows.scales is None:
        return stored
    into = _ops.empty_beside(stored, shape, torch.float32)
    matrix = _ops.as_matrix(shape) if rows.whole_rows(shape) else (1, into.numel())
    _ops.decode(into.view(matrix), stored, rows.code, scales=rows.scales, block=rows.block)
    return into


def _merge_wide(patches: Sequence[tuple[Patch, float]], base: Tensor, dtype: torch.dtype) -> Tensor:
    """The same where one of the patches is no product: some rows after the other, so that what is
    wide is never the whole of a big weight, if all patches can be cut.
    """
    result = _ops.empty_beside(base, base.shape, dtype)
    rows, into = (base.reshape(1), result.view(1)) if base.dim() == 0 else (base, result)
    count = rows.shape[0]
    step = math.lcm(*(patch.kind.cuts for patch, _ in patches)) or count
    if rows.dim() < 2 or any(patch.first_row % step for patch, _ in patches):
        step = count
    at_once = max(step, _WIDE_NUMBERS // max(rows[:1].numel(), 1) // max(step, 1) * step)
    for begin in range(0, count, max(at_once, 1)):
        part = slice(begin, min(begin + at_once, count))
        into[part] = _merge_rows(patches, rows[part], begin, count, dtype)
    return result


def _merge_rows(
    patches: Sequence[tuple[Patch, float]], base: Tensor, begin: int, count: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a weight of `count` rows, from `begin` on, with their patches."""
    wide = torch.complex128 if base.is_complex() else _WIDE
    if base.device.type == "mps":  # has no float64
        wide = torch.float32
    weight = base.to(wide)
    result = weight.clone()
    for patch, strength in patches:
        first, kind = patch.first_row, patch.kind
        own = (kind.rows() if patch.part else None) or count - first
        low, high = max(first, begin), min(first + own, begin + base.shape[0])
        if low >= high:
            continue
        if (low, high) != (first, first + own):
            kind = kind.some_rows(low - first, high - first)
        part = slice(low - begin, high - begin)
        delta = kind.delta(weight[part])
        if not bool(torch.isfinite(delta).all()):
            raise patch.complaint("its delta has NaN or inf values")
        result[part] += strength * delta
    # The sum is float32's before it is rounded to what is narrower.
    return result.to(dtype) if dtype.itemsize >= 4 else result.float().to(dtype)


def _not_finite(patches: Sequence[tuple[Patch, float]]) -> FormatError:
    for patch, _ in patches:
        if any(not bool(torch.isfinite(factor).all()) for factor in patch.kind.factors() or ()):
            return patch.complaint("its factors have NaN or inf values")
    return patches[0][0].complaint("its delta has NaN or inf values")


# ---- reading and resolving ------------------------------------------------------


class LoraReader:
    """Reads LoRAs for one module; files that it read before are not read again."""

    def __init__(self, shapes: Shapes, transposed: Collection[str] = ()) -> None:
        self.shapes = dict(shapes)
        self._transposed = frozenset(transposed)
        self._targets: Targets | None = None
        self._known: dict[object, tuple[LoraSource, ResolvedLora]] = {}

    def read(
        self, loras: Sequence[tuple[LoraSource, float]], strict: bool
    ) -> tuple[Patches, list[tuple[ResolvedLora, float]]]:
        """All LoRAs as patches. FormatError when one is damaged or fits nothing."""
        patches, found = Patches(), []
        known: dict[object, tuple[LoraSource, ResolvedLora]] = {}
        for source, strength in _checked(loras):
            identity = identity_of(source)
            if identity not in known:
                known[identity] = self._known.get(identity) or (
                    source,
                    self._resolve(source, strict),
                )
            lora = known[identity][1]
            patches.add(lora, strength)
            found.append((lora, strength))
        self._known = known  # those that are not used any more may go
        return patches, found

    def _resolve(self, source: LoraSource, strict: bool) -> ResolvedLora:
        if self._targets is None:
            self._targets = Targets(self.shapes)
        file = read_lora(source)
        resolved = resolve(file, self._targets, self._transposed)
        _complain(file, resolved, self._targets, strict)
        return resolved


def _checked(loras: Sequence[tuple[LoraSource, float]]) -> list[tuple[LoraSource, float]]:
    found = []
    for entry in loras:
        if isinstance(entry, str | Mapping) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise SpecError(
                f"loras: expected (file or state dict, strength) pairs, found {entry!r:.80}"
            )
        source, strength = entry
        try:
            number = float(strength)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SpecError(f"LoRA strength {strength!r}: expected a finite number")
        found.append((source, number))
    return found


def resolve(file: LoraFile, targets: Targets, transposed: Collection[str] = ()) -> ResolvedLora:
    """A file's patches on the weights that `targets` knows. FormatError on what does not fit."""
    groups, unknown = group_keys(file.tensors)
    by_part: dict[str, list[Patch]] = {}
    unmatched, elsewhere = list(unknown), list[str]()
    missed: dict[str, list[str]] = {}
    for stem, group in groups.items():
        found = _patches_of(file, stem, group, targets, transposed)
        part = component_of(stem)
        if found:
            by_part.setdefault(part, []).extend(found)
        else:
            missed.setdefault(part, []).append(stem)
    _drop_other_encoders(by_part, elsewhere, targets)
    for part, stems in missed.items():
        other = part and part not in by_part and by_part
        (elsewhere if other else unmatched).extend(stems)
    patches = [patch for found in by_part.values() for patch in found]
    for patch in patches:
        _check_fit(patch, targets.shapes)
    return ResolvedLora(file.label, patches, unmatched, elsewhere, len(groups) + len(unknown))


def _drop_other_encoders(
    by_part: dict[str, list[Patch]], elsewhere: list[str], targets: Targets
) -> None:
    """Text encoders share names: those of another size are not this module's."""
    encoders = [part for part in by_part if part.startswith("text")]
    misfits = [
        part
        for part in encoders
        if any(not _fits(patch, targets.shapes) for patch in by_part[part])
    ]
    if len(misfits) < len(encoders):
        for part in misfits:
            elsewhere += [patch.stem for patch in by_part.pop(part)]


def _fits(patch: Patch, shapes: Shapes) -> bool:
    part = _part_shape(patch, shapes[patch.weight])
    return bool(part) and patch.kind.fits(part)


def _part_shape(patch: Patch, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the rows that a patch is for; () where the weight does not have them."""
    rows = patch.kind.rows()
    if not patch.part or rows is None:
        return shape
    if patch.first_row < 0 or patch.first_row + rows > shape[0]:
        return ()
    return (rows, *shape[1:])


def _check_fit(patch: Patch, shapes: Shapes) -> None:
    if not _fits(patch, shapes):
        raise patch.complaint(
            f"it was made for {patch.kind.shape()}, the weight's shape is "
            f"{tuple(shapes[patch.weight])}; it was made for another model"
        )


def _patches_of(
    file: LoraFile, stem: str, group: Group, targets: Targets, transposed: Collection[str]
) -> list[Patch]:
    places = targets.find(stem)
    if not places:
        return []
    parts = dict(group.parts)
    alpha = parts.pop("alpha", None)
    biases = [parts.pop("up_bias", None), parts.pop("diff_b", None)]
    own = float(alpha) if alpha is not None and alpha.numel() == 1 else None
    scaling = file.scaling(stem.removeprefix("base_model.model."), own)
    found: list[Patch] = []
    try:
        if parts:
            kind = make_kind(parts, scaling)
            for place in places:
                turned = _turned(kind, place, transposed)
                found.append(_put(turned, place, place.weight, targets, (stem, file.label)))
        for bias, scale in zip(biases, (_bias_scale(parts, scaling), 1.0), strict=True):
            if bias is None:
                continue
            for place in places:
                name = targets.bias_of(place.weight)
                if name is None:
                    raise FormatError(f"it has a bias, {place.weight!r} has none")
                added = DifferenceKind(bias, scale)
                found.append(_put(added, place, name, targets, (stem, file.label)))
    except FormatError as error:
        raise FormatError(f"{file.label}: {stem!r}: {error}") from error
    return found


def _put(kind: Kind, place: Place, weight: str, targets: Targets, source: tuple[str, str]) -> Patch:
    """The patch on the rows of a weight that `place` names. `source`: its stem and file."""
    if place.cut is not None:
        kind = kind.some_rows(*place.cut)
    if isinstance(kind, DifferenceKind) and not place.part:
        kind = kind.shaped(targets.shapes[weight])
    first, rows = 0, kind.rows()
    if place.step:
        if rows is None:
            raise FormatError(f"a {kind.name} cannot go on a part of the fused {weight!r}")
        end = 0 if place.step > 0 else targets.shapes[weight][0]
        first = end + place.step * rows
    return Patch(weight, kind, first, place.part, *source)


def _bias_scale(parts: Mapping[str, Tensor], scaling: Scaling) -> float:
    down = parts.get("down")
    return scaling.of(int(down.shape[0])) if down is not None else 1.0


def _turned(kind: Kind, place: Place, transposed: Collection[str]) -> Kind:
    """A patch made for [out, in] on a weight that is kept as [in, out] (Conv1D of GPT-2)."""
    if place.weight not in transposed or not isinstance(kind, LowRankKind | DecomposedKind):
        return kind
    return kind.transposed()


def _complain(file: LoraFile, resolved: ResolvedLora, targets: Targets, strict: bool) -> None:
    if resolved.patches and not resolved.unmatched:
        return
    shown = (resolved.unmatched or resolved.elsewhere or list(file.tensors))[:_SHOWN]
    names = list(targets.shapes)[:_SHOWN]
    message = (
        f"{file.label}: {len(resolved.unmatched)} of its {resolved.targets} targets fit no weight "
        f"(as {shown}); the module has names as {names}"
    )
    if not resolved.patches:
        raise FormatError(f"{message}; it was made for another model")
    if strict:
        raise FormatError(f"{message}; strict_loras=False skips single keys")
    warnings.warn(message, stacklevel=4)
