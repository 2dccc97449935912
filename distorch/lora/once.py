# SPDX-License-Identifier: Apache-2.0
"""One change once: in a file that says it twice, and on a weight that modules share.

Trainers write a fused projection and its parts side by side, or one module under two names. Both
change the same rows, and their sum would be twice what was trained. Tied weights have the same
trouble: an embedding and a head that are one weight can only be changed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from distorch.errors import FormatError
from distorch.lora.around import padded
from distorch.lora.kinds import Kind, RowsKind, as_like
from distorch.lora.other_names import Shapes
from distorch.lora.patches import Applied, Patch, Patches
from distorch.lora.products import LowRankKind, StackedKind

_CLOSE = 1e-5  # of the largest number: two spellings may have been rounded apart
_PROBES = 2  # random columns that stand for all of them
_AT_ONCE = 1 << 22  # numbers of a weight, at one time


def without_repeats(patches: Sequence[Patch], shapes: Shapes) -> list[Patch]:
    """The patches of one file, each change once. FormatError where two of them disagree."""
    kept: dict[str, dict[int | None, list[Patch]]] = {}  # weight -> expert (None: all) -> patches
    for patch in patches:
        of_weight, expert = kept.setdefault(patch.weight, {}), _expert_of(patch)
        shape = shapes[patch.weight]
        # There may be thousands for single experts: they are compared with their own expert's.
        near = of_weight if expert is None else {expert: None, None: None}
        others = [other for key in near for other in of_weight.get(key, ())]
        repeats = [other for other in others if _both_change(patch, other, shape)]
        for other in repeats:
            if not same_change(patch, other, shape):
                raise FormatError(
                    f"{patch.label}: {other.stem!r} and {patch.stem!r} both change "
                    f"{patch.weight!r}, and do not agree. Remove the keys of one of them"
                )
        if any(_covers(other, patch, shape) for other in repeats):
            continue
        for other in repeats:  # it has all that they have
            of_weight[_expert_of(other)].remove(other)
        of_weight.setdefault(expert, []).append(patch)
    left = {id(p) for of_weight in kept.values() for found in of_weight.values() for p in found}
    return [patch for patch in patches if id(patch) in left]


def _expert_of(patch: Patch) -> int | None:
    """The expert that a patch is for; None: for all, or its weight is no stack."""
    alone = isinstance(patch.kind, StackedKind) and patch.kind.rows() == 1 and patch.part
    return patch.first_row if alone else None


def patches_of_tied(
    patches: Patches, ends: Sequence[Sequence[str]], shape: Sequence[int]
) -> Applied:
    """The patches of one weight that several modules have: `ends` are its names in each of them.

    FormatError unless all of them are to be changed alike.
    """
    found = [_by_any_name(patches, names, shape) for names in ends]
    if len(ends) == 1 or not any(found):
        return found[0]
    changed = [entries for entries in found if entries]
    if len(changed) == 1 and all(
        _is_for_all(patch, changed[0] is found[0]) for patch, _ in changed[0]
    ):
        return changed[0]
    for names, entries in zip(ends[1:], found[1:], strict=True):
        if not _alike(found[0], entries, shape):
            patch = next(patch for entries in found for patch, _ in entries)
            raise patch.complaint(
                f"{ends[0][0]!r} and {names[0]!r} are tied: they are one weight, and the LoRA does "
                "not change both alike. Untie them first (give one module a clone of the parameter "
                "and set tie_word_embeddings to False in the configuration), or leave these keys "
                "out"
            )
    return found[0]


def _by_any_name(patches: Patches, names: Sequence[str], shape: Sequence[int]) -> Applied:
    """The patches of one module's weight. A module may have several names, and a file use more than
    one of them.
    """
    found = [entries for entries in (patches.of([name]) for name in names) if entries]
    for entries in found[1:]:
        if not _alike(found[0], entries, shape):
            one, other = found[0][0][0], entries[0][0]
            raise one.complaint(
                f"{one.weight!r} and {other.weight!r} are one module, and {one.stem!r} and "
                f"{other.stem!r} do not change it alike. Remove the keys of one of them"
            )
    return found[0] if found else []


def _is_for_all(patch: Patch, on_first: bool) -> bool:
    """Whether one end's patch is meant for the others, too. Rows of tokens are the embedding's,
    which comes first.
    """
    return patch.all_ends and (on_first or not isinstance(patch.kind, RowsKind))


def _alike(one: Applied, other: Applied, shape: Sequence[int]) -> bool:
    return len(one) == len(other) and all(
        ours[1] == theirs[1] and same_change(ours[0], theirs[0], shape)
        for ours, theirs in zip(one, other, strict=True)
    )


# What was found of pairs of patches: they are asked for at every set_loras.
_known: WeakKeyDictionary[Patch, WeakKeyDictionary[Patch, bool]] = WeakKeyDictionary()


def same_change(one: Patch, other: Patch, shape: Sequence[int]) -> bool:
    """Whether two patches of a weight do the same to the rows that both have. False where neither
    has all rows of the other.
    """
    known = _known.setdefault(one, WeakKeyDictionary())
    if other not in known:
        known[other] = _compared(one, other, shape)
    return known[other]


def _compared(one: Patch, other: Patch, shape: Sequence[int]) -> bool:
    if not (_covers(one, other, shape) or _covers(other, one, shape)):
        return False
    rows = _shared(one, other, shape)
    at_once = len(rows)
    if all(patch.kind.cuts == 1 for patch in (one, other)):
        at_once = max(1, _AT_ONCE // max(torch.Size(shape[1:]).numel(), 1))
    return all(
        _same_rows(one, other, range(begin, min(begin + at_once, rows.stop)), shape)
        for begin in range(rows.start, rows.stop, max(at_once, 1))
    )


def _same_rows(one: Patch, other: Patch, rows: range, shape: Sequence[int]) -> bool:
    ours, theirs = (_effect(patch, rows, shape) for patch in (one, other))
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return True  # the merge says what is wrong with them
    largest = max(float(ours.abs().max()), float(theirs.abs().max()))
    return bool(((ours - theirs).abs() <= _CLOSE * largest).all())


def _both_change(one: Patch, other: Patch, shape: Sequence[int]) -> bool:
    # One stem may bring a bias in two pieces. A file may replace a weight and patch the new one.
    if one.stem == other.stem:
        return False
    if _is_whole(one.kind) != _is_whole(other.kind):
        return False
    if isinstance(one.kind, StackedKind) and isinstance(other.kind, StackedKind):
        a, b = one.kind.inner_rows, other.kind.inner_rows
        if a.stop <= b.start or b.stop <= a.start:  # gates and ups of one expert
            return False
    return len(_shared(one, other, shape)) > 0


def _is_whole(kind: Kind) -> bool:
    """Whether it replaces all of a weight, and not rows of it."""
    return kind.replaces and not isinstance(kind, RowsKind)


def _rows(patch: Patch, shape: Sequence[int]) -> range:
    whole = shape[0] if shape else 1
    own = (patch.kind.rows() if patch.part else None) or whole - patch.first_row
    return range(patch.first_row, patch.first_row + own)


def _shared(one: Patch, other: Patch, shape: Sequence[int]) -> range:
    a, b = _rows(one, shape), _rows(other, shape)
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _covers(one: Patch, other: Patch, shape: Sequence[int]) -> bool:
    a, b = _rows(one, shape), _rows(other, shape)
    return a.start <= b.start and b.stop <= a.stop


def _effect(patch: Patch, rows: range, shape: Sequence[int]) -> Tensor:
    """What a patch does to some rows of a weight of random numbers, as it acts on random columns:
    float64 [rows, _PROBES]; of a vector, what it adds.
    """
    own = _rows(patch, shape)
    random = torch.Generator().manual_seed(rows.start)
    columns = torch.Size(shape[1:]).numel()
    probes = torch.randn(columns, _PROBES, generator=random, dtype=torch.float64)
    part = slice(rows.start - own.start, rows.stop - own.start)
    kind = patch.kind
    if own_columns := kind.columns():  # fewer, where another patch makes the layer wider
        kind = padded(kind, own_columns, columns)
    if isinstance(kind, LowRankKind):
        up, down = (as_like(factor, probes) for factor in (kind.up, kind.down))
        return up[part] @ (down @ probes) * kind.scale
    if kind.cuts == 1 and len(rows) < len(own):
        kind, own, part = kind.some_rows(part.start, part.stop), rows, slice(None)
    weight = torch.randn((len(own), *shape[1:]) if shape else (), generator=random).double()
    delta = kind.delta(weight)
    delta = delta.flatten(1) if delta.dim() > 1 else delta.reshape(-1, 1)
    return delta[part] @ probes if delta.shape[1] == columns > 1 else delta[part]
