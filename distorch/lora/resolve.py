# SPDX-License-Identifier: Apache-2.0
"""From a LoRA's keys to patches on a module's weights: each change once, and none by guess."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distorch.errors import FormatError, SpecError, warn_at_caller
from distorch.lora import minimax_h3
from distorch.lora.around import padded, turned
from distorch.lora.assemble import Scaling, make_kind
from distorch.lora.configuration import PEFT_PREFIX
from distorch.lora.files import LoraFile, LoraSource, identity_of, read_lora
from distorch.lora.kinds import DifferenceKind, Kind, ReplacementKind, RowsKind, shapes_in
from distorch.lora.once import without_repeats
from distorch.lora.other_names import OPTIONAL_BRANCH, Place, Shapes
from distorch.lora.patches import Patch, Patches, ResolvedLora
from distorch.lora.products import KroneckerKind, LowRankKind, StackedKind
from distorch.lora.spellings import Group, group_keys
from distorch.lora.stacks import Stack, make_stack, stacks_of, without_levels
from distorch.lora.targets import Targets, WeightKinds, component_of

_SHOWN = 3
_NOWHERE = -1  # the first row of a patch that fits nothing


class LoraReader:
    """Reads LoRAs for one module; files that it read before are not read again."""

    def __init__(self, shapes: Shapes, kinds: WeightKinds | None = None) -> None:
        self.shapes = dict(shapes)
        self.kinds = kinds or WeightKinds()
        self._targets: Targets | None = None
        self._known: dict[object, tuple[LoraSource, ResolvedLora]] = {}

    def read(
        self, loras: Sequence[tuple[LoraSource, float]], strict: bool
    ) -> tuple[Patches, list[tuple[ResolvedLora, float]]]:
        """All LoRAs as patches. FormatError when one is damaged or fits nothing."""
        patches, found = Patches(), []
        known: dict[object, tuple[LoraSource, ResolvedLora]] = {}
        for source, strength, _ in checked_loras(loras):
            identity = identity_of(source)
            if identity not in known:
                before = self._known.get(identity)
                known[identity] = before or (source, self._resolve(source))
                _complain(known[identity][1], strict, again=before is not None)
            lora = known[identity][1]
            patches.add(lora, strength)
            found.append((lora, strength))
        self._known = known  # those that are not used any more may go
        return patches, found

    def _resolve(self, source: LoraSource) -> ResolvedLora:
        if self._targets is None:
            self._targets = Targets(self.shapes, self.kinds)
        file = read_lora(source)
        resolved = resolve(file, self._targets)
        resolved.complaints = _complaints(file, resolved, self._targets)
        resolved.source = source
        return resolved


def checked_loras(loras: object, *, of_parts: bool = False) -> list[tuple[LoraSource, float, str]]:
    """(source, strength, part) of every entry. Where LoRAs are `of_parts` of a pipeline, an entry
    may name its part; else it is "". SpecError.
    """
    what = "(file or state dict, strength)"
    if not isinstance(loras, Iterable) or isinstance(loras, str | os.PathLike | Mapping):
        raise SpecError(
            f"loras={loras!r:.80}: expected a list of {what} pairs, such as "
            "[('style.safetensors', 0.8)]; [] is none"
        )
    found = []
    for entry in loras:
        is_list = isinstance(entry, Sequence) and not isinstance(entry, str)
        if not is_list or len(entry) not in ((2, 3) if of_parts else (2,)):
            more = " or (file, strength, part)" * of_parts
            raise SpecError(f"loras: expected {what} pairs{more}, found {entry!r:.80}")
        source, strength, *part = entry
        try:
            number = math.nan if isinstance(strength, str) else float(strength)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SpecError(f"LoRA strength {strength!r}: expected a finite number")
        found.append((source, number, str(part[0]) if part else ""))
    return found


def resolve(file: LoraFile, targets: Targets) -> ResolvedLora:
    """A file's patches on the weights that `targets` knows. FormatError on what does not fit."""
    try:
        groups, unknown = group_keys(file.tensors)
    except FormatError as error:
        raise FormatError(f"{file.label}: {error}") from error
    whole = {key: patch for key in unknown if (patch := _whole_rows(file, key, targets))}
    strays = [key for key in unknown if key not in whole]
    by_part: dict[str, list[Patch]] = {"": list(whole.values())} if whole else {}
    missed: dict[str, list[str]] = {}
    for stem, found in _found(file, groups, targets):
        part = component_of(stem)
        if found:
            by_part.setdefault(part, []).extend(found)
        else:
            missed.setdefault(part, []).append(stem)
    unmatched, elsewhere = list(strays), list[str]()
    _drop_other_encoders(by_part, elsewhere, targets)
    for part, stems in missed.items():
        other = part and part not in by_part and by_part
        (elsewhere if other else unmatched).extend(stems)
    patches = [patch for found in by_part.values() for patch in found]
    _check_strays(file, strays, patches)
    absent = _of_an_absent_branch(unmatched, patches)
    patches, shapes = _alike_wide(patches, targets)
    # What a file replaces, it replaces first: its other patches are for the new values.
    patches.sort(key=lambda patch: not patch.kind.replaces)
    misfits = [patch for patch in patches if not _fits(patch, shapes)]
    half = {patch.stem for patch in misfits}  # a target is patched as a whole, or not at all
    fitting = [patch for patch in patches if patch.stem not in half]
    _check_parts(fitting, shapes)
    return ResolvedLora(
        file.label,
        without_repeats(fitting, shapes),
        [stem for stem in unmatched if stem not in absent],
        elsewhere,
        len(groups) + len(unknown),
        misfits,
        absent,
    )


def _found(
    file: LoraFile, groups: Mapping[str, Group], targets: Targets
) -> Iterator[tuple[str, list[Patch]]]:
    """Each stem and its patches; none where it names nothing that the module has."""
    minimax_h3.as_usual(file, groups, targets)
    stacks = stacks_of(file, groups, targets)
    for stem, group in groups.items():
        if stem in stacks:
            yield stem, [_on_parameter(file, stem, group, stacks[stem], targets)]
        else:
            yield stem, _patches_of(file, stem, group, targets)


def _alike_wide(patches: list[Patch], targets: Targets) -> tuple[list[Patch], Shapes]:
    """The patches, and the shapes that their weights have with them: patches of an input layer may
    have more columns than it. All of one layer get as many as the widest, the added ones zero.
    """
    shapes = dict(targets.shapes)
    for name in targets.kinds.inputs:
        rows, columns = shapes[name]
        widths = [patch.kind.columns() for patch in patches if patch.weight == name]
        shapes[name] = rows, max([columns, *(width for width in widths if width is not None)])

    def alike(patch: Patch) -> Patch:
        name = patch.weight
        if name not in targets.kinds.inputs or patch.part:
            return patch
        return replace(patch, kind=padded(patch.kind, targets.shapes[name][1], shapes[name][1]))

    return [alike(patch) for patch in patches], shapes


def _check_strays(file: LoraFile, strays: Collection[str], patches: Collection[Patch]) -> None:
    """A key that is not known, below a stem whose other keys are, is a part of that patch."""
    stems = {patch.stem for patch in patches} if strays else set()
    for key in strays:
        above = key
        while above and above not in stems:
            above = above.rpartition(".")[0]
        if above:
            raise FormatError(
                f"{file.label}: {key!r} belongs to {above!r}, and this version does not know it: "
                "the patch would be wrong without it"
            )


def _of_an_absent_branch(unmatched: Collection[str], patches: Collection[Patch]) -> list[str]:
    """The stems that are for a branch of which this module has nothing."""
    if any(OPTIONAL_BRANCH.search(patch.stem) for patch in patches):
        return []
    return [stem for stem in unmatched if OPTIONAL_BRANCH.search(stem)]


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
    """Whether the weight has the rows that a patch is for, and they have its shape."""
    rows = patch.kind.rows()
    height = shapes[patch.weight][0] if patch.part else 0
    if patch.part and rows is not None and not 0 <= patch.first_row <= height - rows:
        return False
    return patch.kind.fits(_shape_of(patch, shapes))


def _shape_of(patch: Patch, shapes: Shapes) -> tuple[int, ...]:
    """The shape of what a patch is for: a weight, or some of its rows."""
    shape, rows = shapes[patch.weight], patch.kind.rows()
    return (rows, *shape[1:]) if patch.part and rows is not None else shape


def _check_parts(patches: Iterable[Patch], shapes: Shapes) -> None:
    """FormatError if the parts of a patch do not fit each other.

    It is computed with shapes alone (on the meta device), which takes no memory. So every kind is
    checked in the same way, and a bad one is found before a weight is touched. It takes a
    millisecond, but most layers of a model have the shapes of another one.
    """
    known = set()
    for patch in patches:
        if isinstance(patch.kind, LowRankKind | DifferenceKind | ReplacementKind | RowsKind):
            continue  # `fits` has compared all that they have
        shape = _shape_of(patch, shapes)
        if (key := (shape, shapes_in(patch.kind))) not in known:
            _check_one(patch, shape)
            known.add(key)


def _check_one(patch: Patch, shape: tuple[int, ...]) -> None:
    kind = patch.kind
    try:
        found = kind.delta(torch.empty(shape, device="meta"))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise FormatError(
            f"{patch.label}: {patch.stem!r}: the parts of this {kind.name} do not fit each other "
            f"({str(error).splitlines()[0]:.160})"
        ) from error
    if tuple(found.shape) != shape:
        raise FormatError(
            f"{patch.label}: {patch.stem!r}: the parts of this {kind.name} make up {found.shape}, "
            f"and its weight is {shape}"
        )


def _on_parameter(file: LoraFile, stem: str, group: Group, stack: Stack, targets: Targets) -> Patch:
    """The patch on a parameter that is no layer's weight."""
    try:
        scaling = file.configuration.scaling(stack.key, None)
        kind = make_stack(stack, group.parts, scaling, targets.shapes)
    except FormatError as error:
        raise FormatError(f"{file.label}: {stem!r}: {error}") from error
    return Patch(stack.parameter, kind, 0, False, stem, file.label)


def _patches_of(file: LoraFile, stem: str, group: Group, targets: Targets) -> list[Patch]:
    places = targets.find(stem)
    if not places:
        return []
    parts = dict(group.parts)
    alpha = parts.pop("alpha", None)
    biases = [parts.pop("up_bias", None), parts.pop("diff_b", None)]
    if alpha is not None and alpha.numel() != 1:
        raise FormatError(f"{file.label}: {stem!r}: its alpha has the shape {list(alpha.shape)}")
    own = None if alpha is None else float(alpha)
    scaling = file.configuration.scaling(stem, own)
    found: list[Patch] = []
    try:
        file.configuration.check_agrees(stem, parts)
        if parts:
            kind = make_kind(parts, scaling)
            _check_makers_agree(kind, stem)
            weights = [place.weight for place in places]
            found += _put_all(kind, places, weights, targets, (stem, file.label))
        for bias, scale in zip(biases, (_bias_scale(parts, scaling), 1.0), strict=True):
            if bias is None:
                continue
            names = [targets.bias_of(place.weight) for place in places]
            if None in names:
                without = places[names.index(None)].weight
                raise FormatError(f"it has a bias, {without!r} has none")
            found_names = [name for name in names if name is not None]
            added = DifferenceKind(bias, scale)
            found += _put_all(added, places, found_names, targets, (stem, file.label))
    except FormatError as error:
        raise FormatError(f"{file.label}: {stem!r}: {error}") from error
    return found


def _check_makers_agree(kind: Kind, stem: str) -> None:
    """PEFT and LyCORIS make different weights of a LoKr for a convolution of one dimension."""
    if isinstance(kind, KroneckerKind) and kind.right[0].dim() == 3 and PEFT_PREFIX in stem:
        raise FormatError(
            "PEFT lays out a LoKr of a one-dimensional convolution in a way of its own, which is "
            "not read: merge it with PEFT (merge_and_unload)"
        )


_TOKEN_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta$")


def _whole_rows(file: LoraFile, key: str, targets: Targets) -> Patch | None:
    """Whole weights and whole rows, which PEFT saves beside its factors: they replace."""
    if not key.startswith(PEFT_PREFIX):
        return None
    tokens = _TOKEN_ROWS.match(key)
    name = f"{tokens.group(1)}.weight" if tokens else key
    places = targets.find(name.replace(".base_layer.", "."))
    if len(places) != 1 or places[0].part or places[0].cut:
        return None
    value, weight = file.tensors[key], places[0].weight
    kind: Kind = ReplacementKind(value)
    if tokens:
        indices = file.configuration.token_rows(tokens.group(1))
        kind = RowsKind(torch.tensor(indices, dtype=torch.int64), value)
    shared = bool(tokens) or not file.configuration.saves_module(name)
    return Patch(weight, kind, 0, False, key, file.label, all_ends=shared)


def _put_all(
    kind: Kind,
    places: Sequence[Place],
    weights: Sequence[str],
    targets: Targets,
    source: tuple[str, str],
) -> list[Patch]:
    """The patches on `weights`, one for each place: weights or biases of the same layers."""
    cut, rows = places[-1].cut, kind.rows()
    if cut is not None and rows is not None and rows != cut[1]:  # rows are left over, or missing
        return [Patch(weights[0], kind, _NOWHERE, True, *source)]
    found = []
    for place, weight in zip(places, weights, strict=True):
        mine = turned(kind) if weight in targets.kinds.transposed else kind
        found.append(_put(mine, place, weight, targets, source))
    return found


def _put(kind: Kind, place: Place, weight: str, targets: Targets, source: tuple[str, str]) -> Patch:
    """The patch on the rows of a weight that `place` names. `source`: its stem and file."""
    if place.matrix is not None:
        return _put_on_expert(kind, place, place.matrix, targets, source)
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


def _put_on_expert(
    kind: Kind, place: Place, expert: int, targets: Targets, source: tuple[str, str]
) -> Patch:
    """A patch that was made for one expert's layer, on the stack that all are kept in."""
    if not isinstance(kind, LowRankKind):
        raise FormatError(
            f"a {kind.name} cannot go on one of the experts that {place.weight!r} is a stack of"
        )
    height, (begin, end) = targets.shapes[place.weight][1], place.rows
    if kind.rows() != end - begin:
        return Patch(place.weight, kind, _NOWHERE, True, *source)
    stacked = StackedKind(kind.up[None], kind.down[None], kind.scale, height, begin)
    return Patch(place.weight, stacked, expert, True, *source)


def _bias_scale(parts: Mapping[str, Tensor], scaling: Scaling) -> float:
    down = parts.get("down")
    return scaling.of(int(down.shape[0])) if down is not None else 1.0


def _complaints(file: LoraFile, resolved: ResolvedLora, targets: Targets) -> list[str]:
    """What fits nothing, or has another size."""
    said = [sizes_of(resolved, targets)] if resolved.misfits else []
    if resolved.unmatched or not (resolved.patches or said):
        shown = (resolved.unmatched or resolved.elsewhere or list(file.tensors))[:_SHOWN]
        said.append(
            f"{len(resolved.unmatched)} of its {resolved.targets} targets fit no weight (as "
            f"{shown}); the module has names as {list(targets.shapes)[:_SHOWN]}"
            + _of_parameters(resolved.unmatched, targets)
        )
    return said


def _of_parameters(stems: Sequence[str], targets: Targets) -> str:
    """What to say of stems that name modules with parameters of their own."""
    for stem in stems:
        if count := targets.number_of_experts(stem):
            return f". {stem!r}: there are {count} experts, counted from 0"
        if own := targets.parameters_of(without_levels(stem)):
            return (
                f". {stem!r} is a module with parameters ({', '.join(own)}): adapter_config.json "
                "in the LoRA's folder says for which of them it is (target_parameters)"
            )
    return ""


def _complain(resolved: ResolvedLora, strict: bool, *, again: bool) -> None:
    """FormatError on what does not fit, with `strict` or if that is all; else a warning, once."""
    message = f"{resolved.label}: {'; '.join(resolved.complaints)}"
    if resolved.complaints and not resolved.patches:
        raise FormatError(f"{message}; it was made for another model")
    if resolved.complaints and strict:
        raise FormatError(f"{message}; strict_loras=False skips single keys")
    if again:
        return
    if resolved.absent:
        warn_at_caller(
            f"{resolved.label}: passed over what is for a branch that this module lacks (as "
            f"{resolved.absent[:_SHOWN]}, {len(resolved.absent)} in all)",
            UserWarning,
        )
    if resolved.complaints:
        warn_at_caller(message, UserWarning)


def _layer_of(patch: Patch) -> str:
    return patch.weight.removesuffix(".weight")


def sizes_of(resolved: ResolvedLora, targets: Targets) -> str:
    """Which patches have another size than their weights."""
    shown = []
    for patch in resolved.misfits[:_SHOWN]:
        size = f"the weight's shape is {tuple(targets.shapes[patch.weight])}"
        if patch.first_row == _NOWHERE:
            size = "and the rows that it is for are more or fewer"
        elif any(name.startswith(f"{_layer_of(patch)}.lora_") for name in targets.shapes):
            size += ", and an adapter of PEFT is around it, so that it gets no other one"
        shown.append(
            f"the {patch.kind.name} for {patch.weight!r} ({patch.stem}) was made for "
            f"{patch.kind.shape()}, {size}"
        )
    rest = len(resolved.misfits) - len(shown)
    return "; ".join([*shown, *([f"{rest} more are like that"] if rest else [])])
