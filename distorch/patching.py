"""LoRAs on a distributed module: where the originals are, what is on them, and how that changes.

Note [Originals]
The result of a merge is always computed from a weight's original, never by taking a delta back. A
module that was loaded has its originals in the checkpoint; of one that was distributed, those that
get patched are kept where they were. What a weight has on it now is written down weight by weight
as soon as it is there, so that an interrupt between two of them leaves nothing unknown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from distorch import _donors, _ops
from distorch._behaviour import alias_of_donor, replace_data
from distorch.errors import PlacementError, SpecError
from distorch.formats.safetensors import StoredTensor
from distorch.formats.scales import own_scales
from distorch.lora import (
    LoraReader,
    LoraSource,
    Patch,
    Patches,
    ResolvedLora,
    StoredRows,
    low_rank_terms,
    merge,
)
from distorch.runtime import distribution
from distorch.runtime.groups import Group, Member, group_members, has_bytes, named_members
from distorch.runtime.staging import current_place

Module = TypeVar("Module", bound=nn.Module)
Applied = list[tuple[Patch, float]]

_MODES = ("merge", "fetch")
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class PatchOptions:
    """How patches are put on: `mode` "merge" | "fetch"; `dtype` of patched weights whose base is
    narrower than 16 bits (None: the module's own, else bfloat16; "base": rounded back).
    """

    mode: str = "merge"
    dtype: torch.dtype | str | None = None

    @staticmethod
    def checked(mode: str, dtype: torch.dtype | str | None) -> PatchOptions:
        """Raises SpecError on values that mean nothing."""
        if mode not in _MODES:
            raise SpecError(f"lora_mode={mode!r}: expected 'merge' or 'fetch'")
        if isinstance(dtype, str) and dtype != "base":
            if dtype not in _HALVES:
                raise SpecError(
                    f"patched_dtype={dtype!r}: expected 'bfloat16', 'float16', 'float32' or 'base'"
                )
            dtype = _HALVES[dtype]
        if isinstance(dtype, torch.dtype) and dtype not in _ops.DECODED_DTYPES:
            raise SpecError(f"patched_dtype={dtype}: expected a floating dtype of 16 or 32 bits")
        if mode == "fetch" and dtype == "base":
            raise SpecError("patched_dtype='base' needs lora_mode='merge'")
        return PatchOptions(mode, dtype)

    def dtype_of(self, stored: torch.dtype, module_dtype: torch.dtype) -> torch.dtype:
        """What a patched weight is kept in."""
        if stored.itemsize > 1 or not (stored.is_floating_point or stored in _INTEGERS):
            return stored
        if self.dtype == "base":
            return stored
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return module_dtype if module_dtype in _ops.DECODED_DTYPES else torch.bfloat16


_INTEGERS = (torch.int8, torch.uint8)


@dataclass
class Original:
    """A weight's values before any patch: in a file, or kept. `dtype` what it is unpatched."""

    stored: StoredTensor | None
    rows: StoredRows | None
    dtype: torch.dtype
    kept: torch.Tensor | None = None
    version: int = 0  # of the parameter, when its present values were put there

    def values(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """The stored numbers on the host, in new memory or in `into` (uint8); as StoredTensor.read
        gives them.
        """
        if self.kept is not None:
            with torch.no_grad():
                return self.kept.detach().clone(memory_format=torch.contiguous_format).cpu()
        assert self.stored is not None
        return self.stored.read(into)


@dataclass
class Patching:
    """What a distributed module knows of its LoRAs."""

    reader: LoraReader
    options: PatchOptions
    originals: dict[str, Original] = field(default_factory=dict)
    applied: dict[str, Applied] = field(default_factory=dict)
    loras: list[tuple[ResolvedLora, float]] = field(default_factory=list)

    def copy(self) -> Patching:
        """For a copy of the module."""
        originals = {name: Original(**vars(known)) for name, known in self.originals.items()}
        applied = {name: list(entries) for name, entries in self.applied.items()}
        return Patching(self.reader, self.options, originals, applied, list(self.loras))

    def rows(self) -> list[dict[str, Any]]:
        """One entry per LoRA, for reports."""
        return [
            {
                "lora": lora.label,
                "strength": strength,
                "weights": len({patch.weight for patch in lora.patches}),
                "unmatched": list(lora.unmatched),
                "for other models": len(lora.elsewhere),
            }
            for lora, strength in self.loras
        ]


def base_name(name: str) -> str:
    """The name of a weight before PEFT put it under an adapter."""
    return name.replace(".base_layer.", ".")


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, tied ones under each of their names."""
    return {base_name(m.name): tuple(m.parameter.shape) for m in named_members(module)}


def transposed_weights(module: nn.Module) -> set[str]:
    """Weights that their modules keep as [in, out]."""
    return {
        base_name(m.name)
        for m in named_members(module)
        if type(m.owner).__name__ == "Conv1D" and m.parameter.dim() == 2
    }


def new_reader(module: nn.Module) -> LoraReader:
    """A reader of LoRAs for this module."""
    return LoraReader(shapes_of(module), transposed_weights(module))


def check_plain_numbers(member: Member, dtype: torch.dtype) -> None:
    """Numbers that mean something only with the module's own scales cannot be patched alone.

    `dtype` of those numbers. Raises PlacementError.
    """
    scales = own_scales(member.owner, member.key) if dtype.itemsize == 1 else None
    if scales is not None:
        raise PlacementError(
            f"{member.name!r} has {dtype} numbers whose scales ({scales!r}) belong to its "
            f"{type(member.owner).__name__}: a LoRA added to the numbers alone would be wrong. "
            "Put it on as an adapter (PEFT), or load the file into modules without scales of their "
            "own, such as nn.Linear: distorch applies them then"
        )


def merged_value(
    patches: Applied, values: torch.Tensor, rows: StoredRows | None, dtype: torch.dtype,
    compute: torch.device, *, shape: Sequence[int] | None = None, into: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The patched weight, computed on `compute` where it has the kernel. `values` may be reused.

    `shape` of the weight, where the values are blocks; `into`: where the result may be written.
    """
    device = compute if _ops.can_decode(compute) else torch.device("cpu")
    narrow = dtype.itemsize == 1
    target = torch.float32 if narrow else dtype
    value = merge(patches, values.to(device), target, rows, shape=shape, into=into, in_place=True)
    if narrow and rows is not None and rows.scales is not None:
        value = _unscaled(value, rows)
    if dtype in _INTEGERS:
        limits = torch.iinfo(dtype)
        value = value.round().clamp(limits.min, limits.max)
    return value.to(dtype)


def _unscaled(value: torch.Tensor, rows: StoredRows) -> torch.Tensor:
    """The numbers that the scales make `value` of (float32), for rounding back to them."""
    assert rows.scales is not None
    matrix = value.view(_ops.as_matrix(value.shape))
    grid = rows.scales.to(value.device)
    grid = grid.repeat_interleave(rows.block[0], 0)[: matrix.shape[0]]
    grid = grid.repeat_interleave(rows.block[1], 1)[:, : matrix.shape[1]]
    return (matrix / grid).view(value.shape)


def set_loras(
    module: Module,
    loras: Sequence[tuple[LoraSource, float]],
    *,
    strict_loras: bool = True,
    lora_mode: str | None = None,
    patched_dtype: torch.dtype | str | None = None,
    progress: bool | None = None,
) -> Module:
    """Puts these LoRAs, and no others, on a distributed module; returns the module.

    `loras` are (file or state dict, strength) pairs, in the order in which they are added. Only
    weights for which something changes are computed again, from their original bytes; with `[]`
    they are those bytes again. `lora_mode` "merge" writes the results to where the weights are;
    "fetch" adds low-rank patches when a weight is fetched: a change of strength moves no bytes, the
    results are the same. `lora_mode` and `patched_dtype` stay as they were unless given. A patched
    weight of 8 bits takes 16 in "merge" mode: plan and report count it so, even where that is more
    than the spec gave its device; `redistribute` then places anew.
    Raises FormatError, SpecError, PlacementError, FetchError; an error or an interrupt leaves the
    module with the LoRAs that it had.
    """
    state = distribution.distribution_of(module)
    known = state.patching
    if known is None:
        known = Patching(new_reader(module), PatchOptions())
    before = known.options
    options = PatchOptions.checked(
        before.mode if lora_mode is None else lora_mode,
        before.dtype if patched_dtype is None else patched_dtype,
    )
    if known.reader.shapes.keys() != shapes_of(module).keys():  # adapters came or went
        known.reader = new_reader(module)
    patches, found = known.reader.read(loras, strict_loras)
    groups = group_members(module)
    changes = _changes(groups, patches, known, options)
    _check_unchanged(changes, known)
    state.patching = known
    with torch.no_grad():
        _apply(changes, known, options, state.plan.compute, progress)
    known.options, known.loras = options, found
    _settle(module, state, groups)
    return module


@dataclass
class _Change:
    group: Group
    old: Applied
    new: Applied
    old_options: PatchOptions


@dataclass(frozen=True)
class _Work:
    options: PatchOptions
    compute: torch.device


def _same(old: Applied, new: Applied) -> bool:
    return [(id(p), s) for p, s in old] == [(id(p), s) for p, s in new]


def _changes(
    groups: Iterable[Group], patches: Patches, known: Patching, options: PatchOptions
) -> list[_Change]:
    changes = []
    for group in groups:
        old = known.applied.get(base_name(group.name), [])
        new = patches.of([base_name(member.name) for member in group.members])
        if not has_bytes(group.first):
            if new:
                raise PlacementError(
                    f"{group.name!r} is a {type(group.first.data).__name__}, to which no LoRA can "
                    "be added: put the LoRA on as an adapter (PEFT)"
                )
            continue
        original = known.originals.get(base_name(group.name))
        if new and (original is None or original.rows is None):
            check_plain_numbers(group.members[0], group.first.dtype)
        respelled = options != known.options and (old or new)
        if not _same(old, new) or respelled:
            changes.append(_Change(group, old, new, known.options))
    return changes


def _check_unchanged(changes: Iterable[_Change], known: Patching) -> None:
    """Somebody's own writes to a patched weight would be lost."""
    for change in changes:
        group = change.group
        original = known.originals.get(base_name(group.name))
        if len({(m.parameter.dtype, tuple(m.parameter.shape)) for m in group.members}) > 1:
            raise PlacementError(
                f"{group.name!r} shares its bytes with weights of another shape: patch them as "
                "plain tensors, after distorch.undistribute(model)"
            )
        if original is None or original.version == group.first._version:
            continue
        if change.old:
            raise PlacementError(
                f"{group.name!r} was written to after its LoRAs were put on: set_loras computes "
                "weights from their originals, which would undo that. Save the model's "
                "state_dict(), and load it as a checkpoint"
            )
        known.originals.pop(base_name(group.name))  # unpatched: its values now are the original


def _apply(
    changes: list[_Change],
    known: Patching,
    options: PatchOptions,
    compute: str,
    progress: bool | None,
) -> None:
    """All changes, or none: what was done is taken back on an error or an interrupt."""
    show = sys.stderr.isatty() if progress is None else progress
    total = sum(change.group.nbytes for change in changes)
    begun: list[_Change] = []
    device = torch.device(compute)
    try:
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="patching", disable=not show) as bar,
            _Originals(changes, known, options) as originals,
        ):
            for change in changes:
                values = originals.next()
                begun.append(change)
                _redo(change.group, change.new, known, _Work(options, device), values)
                bar.update(change.group.nbytes)
    except BaseException:
        for change in reversed(begun):
            _redo(change.group, change.old, known, _Work(change.old_options, device))
        raise


class _Originals:
    """The originals of weights that are merged anew, each read while the one before is merged."""

    def __init__(self, changes: list[_Change], known: Patching, options: PatchOptions) -> None:
        self._wanted = [_read_ahead(change, known, options) for change in changes]
        room = max((stored.room for stored in self._wanted if stored is not None), default=0)
        self._buffers = [torch.empty(room, dtype=torch.uint8) for _ in range(2)] if room else []
        self._reads: list[Future[torch.Tensor] | None] = []
        self._taken = 0

    def __enter__(self) -> _Originals:
        self._thread = ThreadPoolExecutor(1, "distorch-read")
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _start(self) -> None:
        index = len(self._reads)
        if index >= len(self._wanted):
            return
        stored = self._wanted[index]
        buffer = self._buffers[index % 2] if self._buffers else None
        self._reads.append(None if stored is None else self._thread.submit(stored.read, buffer))

    def next(self) -> torch.Tensor | None:
        """The next change's original, valid until the one after it is asked for; None: not read."""
        read = self._reads[self._taken]
        self._taken += 1
        self._start()
        return None if read is None else read.result()


def _read_ahead(change: _Change, known: Patching, options: PatchOptions) -> StoredTensor | None:
    """What a merge of this change reads from a file, if it does."""
    original = known.originals.get(base_name(change.group.name))
    if original is None or original.stored is None or options.mode == "fetch" or not change.new:
        return None
    return original.stored


def _redo(
    group: Group, patches: Applied, known: Patching, work: _Work, values: torch.Tensor | None = None
) -> None:
    """Gives one weight these patches, and notes that it has them. `values`: its original."""
    name = base_name(group.name)
    original = known.originals.get(name)
    if original is None:
        original = known.originals[name] = Original(None, None, group.first.dtype)
    terms = low_rank_terms(patches) if work.options.mode == "fetch" else None
    if terms is not None and _can_fetch(original, tuple(group.first.shape)):
        _redo_at_fetch(group, terms, original, work)
    else:
        _redo_merged(group, patches, original, work, values)
    known.applied[name] = list(patches)
    original.version = group.first._version


def _can_fetch(original: Original, shape: tuple[int, ...]) -> bool:
    """Whether fetches can patch a weight of this kind."""
    if original.rows is not None and not original.rows.whole_rows(shape):
        return False
    narrow = original.dtype.itemsize == 1 and original.dtype.is_floating_point
    return original.rows is not None or narrow or original.dtype in _ops.DECODED_DTYPES


def _is_decoded(tensor: torch.Tensor) -> bool:
    return _ops.is_sharded(tensor) and _ops.state(tensor).decoded


def _redo_at_fetch(group: Group, terms: _ops.Terms, original: Original, work: _Work) -> None:
    compute, options = work.compute, work.options
    parameter = group.first
    if _is_decoded(parameter) and (len(terms) or original.rows is not None):
        return _ops.set_patches(parameter, terms)
    base = _restored(group, original, compute)
    if not len(terms):
        return _put(group, base)
    if original.rows is None:
        original.kept = base
        if not _ops.is_sharded(base):
            base = _donors.shard_on(current_place(base), base, compute, group.name)
        if base.dtype in _ops.DECODED_DTYPES:
            return _put(group, _ops.patched(base, terms))
        code, dtype = _ops.code_of(base.dtype), options.dtype_of(base.dtype, original.dtype)
        base = _ops.decoded(base, code, dtype, base.shape, name=group.name)
    _ops.set_patches(base, terms)
    return _put(group, base)


def _restored(group: Group, original: Original, compute: torch.device) -> torch.Tensor:
    """The unpatched weight, at the place where it is now."""
    if original.kept is not None:
        return original.kept
    parameter = group.first.detach()
    place, stored, rows = current_place(parameter), original.stored, original.rows
    if stored is None:
        return parameter
    if place == "disk" and stored.in_one_range:
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
    return _ops.decoded(
        stored, rows.code, dtype, shape, scales=rows.scales, block=rows.block, name=name
    )


def _redo_merged(
    group: Group,
    patches: Applied,
    original: Original,
    work: _Work,
    values: torch.Tensor | None,
) -> None:
    compute, options = work.compute, work.options
    if original.stored is not None:
        original.kept = None  # of a patch at fetch
    elif original.kept is None:
        original.kept = group.first.detach()
    if not patches and (original.kept is not None or not _takes(group.first, original)):
        return _put(group, _restored(group, original, compute))
    parameter = group.first
    value = original.values() if values is None else values
    if patches:
        dtype = options.dtype_of(value.dtype, original.dtype)
        shape = tuple(parameter.shape)
        into = _memory_of(parameter, dtype) if original.kept is None else None
        value = merged_value(patches, value, original.rows, dtype, compute, shape=shape, into=into)
        if into is not None and value.data_ptr() == into.data_ptr():
            return None
    if original.kept is None and _takes(parameter, value):
        parameter.data.copy_(value)
        return None
    place = current_place(parameter)
    value = value.clone() if values is not None and value.device.type == "cpu" else value
    if place == str(compute) and not _ops.is_sharded(parameter):
        return _put(group, value.to(compute))
    return _put(group, _donors.shard_on(place, value, compute, group.name))


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


def _put(group: Group, value: torch.Tensor) -> None:
    """Makes `value` the data of every parameter of the group."""
    for parameter in {id(m.parameter): m.parameter for m in group.members}.values():
        replace_data(parameter, value)


def _settle(module: nn.Module, state: distribution.Distribution, groups: list[Group]) -> None:
    """Counters, agents and the ring for weights that have another form now."""
    plan = state.plan
    fresh = group_members(module)
    sizes = {group.name: group.nbytes for group in fresh}
    if any(plan.sizes.get(name, size) != size for name, size in sizes.items()):
        state.plan = plan.resized(sizes)
    distribution.refresh(module, state, fresh)


__all__ = [
    "Original", "PatchOptions", "Patching", "base_name", "check_plain_numbers", "merged_value",
    "new_reader", "set_loras", "with_rows",
]  # fmt: skip
