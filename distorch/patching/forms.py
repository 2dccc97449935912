# SPDX-License-Identifier: Apache-2.0
"""One weight with patches on it: merged into its bytes, or put on when it is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distorch import _donors, _ops
from distorch._behaviour import alias_of_donor, replace_data
from distorch.formats.plain_names import base_name
from distorch.lora import Applied, StoredRows, are_products, low_rank_terms, merge
from distorch.patching.state import INTEGERS, Original, Patching, PatchOptions, names_of
from distorch.patching.widths import widened
from distorch.planner import Plan
from distorch.runtime.groups import Group
from distorch.runtime.staging import current_place


@dataclass(frozen=True)
class Work:
    """How, and for which device, weights are patched."""

    options: PatchOptions
    plan: Plan

    @property
    def compute(self) -> torch.device:
        """The device that operators use the weights on."""
        return torch.device(self.plan.compute)

    def place_of(self, group: Group) -> str:
        """Where a weight belongs. Until its merge is done, its bytes may still be in its file."""
        place = current_place(group.first)
        return self.plan.placement.get(group.name, place) if place == "disk" else place


def redo(
    group: Group,
    patches: Applied,
    known: Patching,
    work: Work,
    values: torch.Tensor | None = None,
    *,
    width: int | None = None,
) -> None:
    """Gives one weight these patches, and notes that it has them. `values`: its original; `width`:
    columns that it gets, if not its own.

    After an error, `touched` of the original says whether the weight may be another one. If it is
    not, what is known of it is as before, too.
    """
    name = base_name(group.name)
    is_new = name not in known.originals
    if is_new:
        known.originals[name] = Original(None, None, group.first.dtype)
    original = known.originals[name]
    kept, widened_before = original.kept, dict(known.widened)
    try:
        _redo(group, patches, known, work, values=values, width=width)
    except BaseException:
        if not original.touched:
            original.kept, known.widened = kept, widened_before
            if is_new:
                known.originals.pop(name, None)
        raise


def _redo(
    group: Group, patches: Applied, known: Patching, work: Work, *,
    values: torch.Tensor | None, width: int | None,
) -> None:  # fmt: skip
    """The work of `redo`, which puts back what is known of a weight after an error."""
    name = base_name(group.name)
    original = known.originals[name]
    if width is not None:
        own = known.widened.get(name, group.first.shape[1])
        known.widened |= dict.fromkeys(names_of(group.members), own)
        _redo_widened(group, patches, original, work, (own, width))
        known.applied[name] = list(patches)
        original.put(group.first)
        return
    if name in known.widened:
        _put(group, original, _restored(group, original, work))
        # Only now: if it failed above, the way back has to know the weight's own columns.
        for other in names_of(group.members):
            known.widened.pop(other, None)
    terms = low_rank_terms(patches, kept=True) if work.options.at_fetch else None
    if terms is not None and _can_fetch(group, patches, original):
        _redo_at_fetch(group, terms, original, work)
    else:
        _redo_merged(group, patches, original, work, values)
        if original.stored is not None:
            original.kept = None  # of a patch at fetch
    known.applied[name] = list(patches)
    original.put(group.first)
    if not patches and original.stored is None and original.rows is None:
        # The weight is its original again. `.data = ` would give it another one, unseen.
        del known.originals[name]


def _redo_widened(
    group: Group, patches: Applied, original: Original, work: Work, columns: tuple[int, int]
) -> None:
    """`columns` of the weight: its own, and those that it gets."""
    if original.stored is None and original.kept is None:
        original.kept = group.first.detach()
    values, shape = original.values(), (group.first.shape[0], columns[0])
    dtype = _result_dtype(values, original, work.options)
    value = merged_value(
        patches, values, original.rows, dtype, work.compute, shape=shape, width=columns[1]
    )
    _put_where_it_belongs(group, original, value, work)


def _result_dtype(values: torch.Tensor, original: Original, options: PatchOptions) -> torch.dtype:
    """What a merged weight is kept in: what it is unpatched, if that is not narrow, whatever its
    file has.
    """
    narrow = original.rows is not None or original.dtype.itemsize == 1
    return options.dtype_of(values.dtype if narrow else original.dtype, original.dtype)


def reads_file(group: Group, patches: Applied, original: Original, options: PatchOptions) -> bool:
    """Whether `redo` reads the original from its file."""
    if original.stored is None or original.kept is not None:
        return False
    stays = options.at_fetch and _is_decoded(group.first)
    return not (stays and (patches or original.rows is not None))


def _can_fetch(group: Group, patches: Applied, original: Original) -> bool:
    """Whether fetches can put these patches on a weight of this kind: one that is stored row by
    row.
    """
    weight = group.first
    stored, plain = original.stored, original.rows is None
    if plain and stored is not None and stored.dtype != original.dtype:
        return False  # it would be rounded twice
    whole = weight.is_contiguous() and group.nbytes == weight.nbytes
    if plain and stored is None and original.kept is None and not whole:
        return False
    if not are_products(patches, original.rows, weight.shape):
        return False
    narrow = original.dtype.itemsize == 1 and original.dtype.is_floating_point
    return original.rows is not None or narrow or original.dtype in _ops.DECODED_DTYPES


def _is_decoded(tensor: torch.Tensor) -> bool:
    return _ops.is_sharded(tensor) and _ops.state(tensor).decoded


def _redo_at_fetch(group: Group, terms: _ops.Terms, original: Original, work: Work) -> None:
    parameter = group.first
    if _is_decoded(parameter) and (len(terms) or original.rows is not None):
        original.touched = True
        return _ops.set_patches(parameter, terms)
    base = _restored(group, original, work)
    if not len(terms):
        return _put(group, original, base)
    if original.rows is None:
        original.kept = base
        if not _ops.is_sharded(base):
            base = _donors.shard_on(current_place(base), base, work.compute, group.name)
        if base.dtype in _ops.DECODED_DTYPES:
            return _put(group, original, _ops.patched(base, terms))
        code, dtype = _ops.code_of(base.dtype), work.options.dtype_of(base.dtype, original.dtype)
        base = _ops.decoded(base, code, dtype, base.shape, name=group.name)
    _ops.set_patches(base, terms)
    return _put(group, original, base)


def _restored(group: Group, original: Original, work: Work) -> torch.Tensor:
    """The unpatched weight, where it belongs or, if it is merged in the background, in its file."""
    parameter, compute = group.first.detach(), work.compute
    place, stored, rows = work.place_of(group), original.stored, original.rows
    if original.kept is not None:
        if (there := current_place(original.kept)) != place:  # the module was redistributed since
            # What is over a map of a file would change with the file, whatever place it is given.
            value = original.values() if there == "disk" else alias_of_donor(original.kept)
            if place == str(compute) and not _ops.is_sharded(parameter):
                original.kept = value.to(compute)
            else:
                original.kept = _donors.shard_on(place, value, compute, group.name)
        return original.kept
    if stored is None:
        return parameter
    in_file = place == "disk" or original.merges_later(work.options)
    as_stored = rows is not None or stored.dtype == original.dtype
    if in_file and as_stored and stored.in_one_range:
        shape = (stored.nbytes,) if stored.block_type else stored.shape
        dtype = stored.dtype
        data = _ops.shard_file(
            stored.path, stored.offset, shape, dtype, compute=compute, name=group.name
        )
    else:
        value = original.values() if rows is not None else original.values().to(original.dtype)
        if rows is None and place == str(compute) and not _is_file_donor(parameter):
            return value.to(compute)
        data = _donors.shard_on(place, value, compute, group.name)
    return data if rows is None else with_rows(data, rows, original.dtype, stored.shape, group.name)


def _is_file_donor(tensor: torch.Tensor) -> bool:
    return _ops.is_sharded(tensor) and not _ops.state(tensor).decoded


def with_rows(
    stored: torch.Tensor, rows: StoredRows, dtype: torch.dtype, shape: Sequence[int], name: str
) -> torch.Tensor:
    """A sharded tensor `dtype` [shape] that is decoded from the bytes of `stored` (sharded)."""
    return _ops.decoded(stored, rows.code, dtype, shape, **rows.options, name=name)


def _redo_merged(
    group: Group,
    patches: Applied,
    original: Original,
    work: Work,
    values: torch.Tensor | None,
) -> None:
    compute = work.compute
    if original.stored is None and original.kept is None:
        original.kept = group.first.detach()
    if not patches and (original.kept is not None or not _takes(group.first, original)):
        return _put(group, original, _restored(group, original, work))
    parameter = group.first
    value = original.values() if values is None else values
    if patches:
        dtype = _result_dtype(value, original, work.options)
        shape = tuple(parameter.shape)
        into = _memory_of(parameter, dtype) if original.kept is None else None
        original.touched = original.touched or into is not None
        value = merged_value(patches, value, original.rows, dtype, compute, shape=shape, into=into)
        if into is not None and value.data_ptr() == into.data_ptr():
            return None
    else:
        value = value.to(original.dtype)  # the file may have another
    if original.kept is None and _takes(parameter, value):
        original.touched = True
        parameter.data.copy_(value)
        return None
    value = value.clone() if values is not None and value.device.type == "cpu" else value
    return _put_where_it_belongs(group, original, value, work)


def _put_where_it_belongs(
    group: Group, original: Original, value: torch.Tensor, work: Work
) -> None:
    place, compute = work.place_of(group), work.compute
    if place == str(compute) and not _ops.is_sharded(group.first):
        _put(group, original, value.to(compute))
    else:
        _put(group, original, _donors.shard_on(place, value, compute, group.name))


def _memory_of(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The memory of a weight that operators use in place, as a plain tensor; else None."""
    if parameter.dtype != dtype or not parameter.is_contiguous():
        return None
    if not _ops.is_sharded(parameter):
        return parameter.detach()
    state = _ops.state(parameter)
    if state.decoded or state.tier != "cpu" or parameter.device.type != "cpu":
        return None
    return alias_of_donor(parameter.detach())


def _takes(parameter: torch.Tensor, value: torch.Tensor | Original) -> bool:
    """Whether such values can be written to where the weight is."""
    if parameter.dtype != value.dtype or (isinstance(value, Original) and value.rows is not None):
        return False
    if not _ops.is_sharded(parameter):
        return True
    state = _ops.state(parameter)
    return not state.decoded and not state.read_only


def _put(group: Group, original: Original, value: torch.Tensor) -> None:
    """Makes `value` the data of every parameter of the group."""
    original.touched = True
    for parameter in {id(m.parameter): m.parameter for m in group.members}.values():
        replace_data(parameter, value)


def merged_value(
    patches: Applied, values: torch.Tensor, rows: StoredRows | None, dtype: torch.dtype,
    compute: torch.device, *, shape: Sequence[int] | None = None, into: torch.Tensor | None = None,
    width: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The patched weight, computed on `compute` where it has the kernel. `values` may be reused.

    `shape` of the weight, where the values are blocks; `into`: where the result may be written;
    `width`: columns that it gets, if not its own.
    """
    if width is not None:
        patches, values = widened(patches, values, rows, shape or values.shape, width)
        rows, shape = None, None
    device = compute if _ops.can_decode(compute) else torch.device("cpu")
    narrow = dtype.itemsize == 1
    target = torch.float32 if narrow else dtype
    value = merge(patches, values.to(device), target, rows, shape=shape, into=into, in_place=True)
    if dtype in INTEGERS:
        limits = torch.iinfo(dtype)
        value = value.round().clamp(limits.min, limits.max)
    return value.to(dtype)
