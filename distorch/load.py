"""load: checkpoint -> (patch) -> donor; reading, patching and leaving overlap.

Note [The pipeline of load]
A thread reads the next tensors, this one patches them, a third brings them to their donors. What is
between the first and the last is never more than two of the largest tensors: a tensor takes its
bytes from that budget before it is read and gives them back when it is in its place.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from distorch import _donors, _ops
from distorch._behaviour import as_parameter, attach_behaviour
from distorch.errors import FormatError, PlacementError, SpecError
from distorch.formats.checkpoint import Checkpoint, match_names, open_checkpoint, weight_info
from distorch.formats.naming import fit_names
from distorch.formats.safetensors import StoredTensor
from distorch.formats.scales import attach_scales
from distorch.lora import LoraSource, Patches, StoredRows, are_low_rank, low_rank_terms
from distorch.patching import (
    Applied,
    Original,
    Patching,
    PatchOptions,
    base_name,
    check_plain_numbers,
    merge_in_background,
    merged_value,
    new_reader,
    patches_on,
    with_rows,
)
from distorch.planner import Inventory, Plan, WeightInfo
from distorch.runtime import distribution, groups
from distorch.runtime.options import Options
from distorch.runtime.staging import Origin

Module = TypeVar("Module", bound=nn.Module)
_Undo = list[tuple[dict[str, Any], str, Any]]

_READERS = 2  # one read begins while the last parts of another come
_PLACED_LATELY = 4
_SHOWN = 4


@dataclass
class _Job:
    """One tensor to bring: where it is stored and every place in the module that it fills.

    `rows` if its numbers have scales or are blocks; `dtype` what its parameter will be unpatched;
    `patches` on it, put on as `terms` when it is fetched if `at_fetch`; `widened` if it is decoded
    for good.
    """

    stored: StoredTensor
    members: list[groups.Member]
    dtype: torch.dtype
    buffer: groups.Buffer | None = None
    rows: StoredRows | None = None
    patches: Applied = field(default_factory=list)
    at_fetch: bool = False
    terms: _ops.Terms | None = None
    patched_dtype: torch.dtype | None = None
    widened: bool = False

    @property
    def name(self) -> str:
        return self.buffer.name if self.buffer is not None else self.members[0].name

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    @property
    def is_stored_form(self) -> bool:
        """Whether the donor keeps the file's own bytes."""
        if self.widened or (self.patches and not self.at_fetch):
            return False
        return self.rows is not None or self.dtype == self.stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes at its place."""
        if self.is_stored_form:
            return self.stored.nbytes
        return prod(self.stored.shape) * self.result_dtype.itemsize

    @property
    def result_dtype(self) -> torch.dtype:
        """What the weight's values are."""
        return self.patched_dtype if self.patches and self.patched_dtype else self.dtype

    def info(self) -> WeightInfo:
        """The tensor as the planner sees it."""
        return replace(
            weight_info(self.stored, self.name, tuple(self.names[1:])), nbytes=self.nbytes
        )


def load(
    module: Module,
    file: str | os.PathLike[str],
    spec: str | None = None,
    *,
    plan: Plan | None = None,
    loras: Sequence[tuple[LoraSource, float]] = (),
    strict: bool = True,
    strict_loras: bool = True,
    lora_mode: str = "merge",
    patched_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | None = None,
    resident: str = "quantised",
    virtual_vram: str | int | None = None,
    donor: str = "cpu",
    progress: bool | None = None,
    **options: Any,
) -> Module:
    """Fills a module from a checkpoint, each weight straight to its place.

    Names are the module's own, or, for modules of diffusers, those of the original checkpoint
    (flux1-dev.safetensors), and for modules of transformers, llama.cpp's in GGUF files.

    `file`: safetensors (one file, or sharded with its index), GGUF, a torch file, or a folder with
    one of them. The module may be on the meta device or fresh: its weights are replaced, in the
    file's dtype; `dtype` converts floating ones on the way. Weights whose numbers have scales in
    the file and none in the module (fp8, int8), and blocks of GGUF files, stay as narrow as they
    are everywhere and become the module's dtype when fetched; `resident="dequantised"` widens once
    and for all those that stay on the compute device. Weights placed on disk are read from that
    very file.

    `loras` are (file or state dict, strength) pairs, added in float32 and rounded once (see
    `set_loras`); `lora_mode` "merge" (now), "fetch" (each time: strengths can be changed at once,
    same bits) or "background" (as "fetch" at first, and merged while the model is used: see
    `finish_merging`);
    `patched_dtype` for patched weights of 8 bits ("bfloat16", "float16", "float32", "base"). Other
    options are those of `distribute`. Peak host memory: what stays there, the ring, two of the
    largest tensors, factors of LoRAs.
    Raises FormatError, SpecError, PlacementError, FetchError; the module is then as it was.
    """
    opts = Options(**options)
    patching = PatchOptions.checked(lora_mode, patched_dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"dtype={dtype!r}: expected a floating torch.dtype, such as torch.bfloat16")
    if resident not in ("quantised", "dequantised"):
        raise SpecError(f"resident={resident!r}: expected 'quantised' or 'dequantised'")
    checkpoint = fit_names(open_checkpoint(file, quantised=True), module)
    _tie_again(module, checkpoint)
    jobs = _match(module, checkpoint, strict, dtype)
    reader = new_reader(module)
    patches, found = reader.read(loras, strict_loras)
    _assign(jobs, patches, patching)
    if plan is None:
        devices = distribution.devices_for((), None)
        for job in jobs if resident == "dequantised" else ():
            job.widened = job.rows is not None  # as it would be on the compute device
        plan = distribution.plan_inventory(
            _inventory(module, jobs), spec, opts, devices, virtual_vram=virtual_vram, donor=donor
        )
        plan = _narrowed(plan, jobs)
    else:
        distribution.check_plan_fits(plan, _inventory(module, jobs))
    _fill(module, jobs, plan, opts, progress=progress)
    known = Patching(reader, patching, loras=found)
    _remember(module, jobs, known)
    if patching.mode == "background":
        merge_in_background(module)
    return module


def _narrowed(plan: Plan, jobs: list[_Job]) -> Plan:
    """The plan, once it is known who stays on the compute device: all others are narrow."""
    for job in jobs:
        job.widened = job.widened and plan.placement[job.name] == plan.compute
    return plan.resized({job.name: job.nbytes for job in jobs})


def _remember(module: nn.Module, jobs: list[_Job], known: Patching) -> None:
    """Where originals are and what is on them, for set_loras."""
    for job in jobs:
        if job.members:
            original = Original(job.stored, job.rows, job.dtype)
            original.put(job.members[0].owner._parameters[job.members[0].key])  # type: ignore[arg-type]
            name = base_name(job.name)
            known.originals[name] = original
            if job.patches:
                known.applied[name] = job.patches
    distribution.distribution_of(module).patching = known


def _assign(jobs: list[_Job], patches: Patches, options: PatchOptions) -> None:
    """Tells each job what is to be added to it."""
    for job in jobs:
        if job.buffer is not None:
            continue
        job.patches = patches_on(job.members, patches)
        if job.patches:
            if job.rows is None:
                check_plain_numbers(job.members[0], job.stored.dtype)
            narrow = job.stored.dtype if job.dtype.itemsize == 1 or job.rows else job.dtype
            job.patched_dtype = options.dtype_of(narrow, _module_dtype(job))
            fits = job.rows is not None or job.dtype == job.stored.dtype
            known = job.patched_dtype in _ops.DECODED_DTYPES
            low_rank = are_low_rank(job.patches)
            whole = job.rows is None or job.rows.whole_rows(job.stored.shape)
            job.at_fetch = options.at_fetch and fits and known and low_rank and whole


def _module_dtype(job: _Job) -> torch.dtype:
    return job.dtype if job.rows is not None else job.members[0].parameter.dtype


def _inventory(module: nn.Module, jobs: list[_Job]) -> Inventory:
    """The module as it will be: what the file brings, and what stays as it is."""
    brought = {job.name: job for job in jobs}
    filled = {id(member.parameter) for job in jobs for member in job.members}
    weights = {}
    for group in groups.group_members(module):
        rest = [member for member in group.members if id(member.parameter) not in filled]
        if rest:
            weights[rest[0].name] = groups.Group(group.begin, group.end, rest).info()
    for job in jobs:
        weights[job.name] = job.info()
    order = {member.name: i for i, member in enumerate(groups.named_members(module))}
    parameters = sorted(
        (weight for name, weight in weights.items() if name in order),
        key=lambda weight: order[weight.name],
    )
    buffers = []
    for buffer in groups.buffer_infos(module):
        new = brought.get(buffer.name)
        info = buffer if new is None else new.info()
        buffers.append(replace(info, kind="buffer"))
    return Inventory((*parameters, *buffers))


def _tie_again(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Tied weights of a transformers model that lost their tie on the way to the meta device."""
    tie = getattr(module, "tie_weights", None)
    if not callable(tie):
        return
    parameters = dict(module.named_parameters())
    names = match_names(checkpoint.tensors, parameters)
    if any(parameters[name].is_meta for name in parameters.keys() - names.keys()):
        tie()


def _match(
    module: nn.Module, checkpoint: Checkpoint, strict: bool, dtype: torch.dtype | None
) -> list[_Job]:
    """Pairs stored tensors with parameters and buffers. FormatError on what does not fit."""
    by_parameter: dict[int, list[groups.Member]] = {}
    for member in groups.named_members(module):
        by_parameter.setdefault(id(member.parameter), []).append(member)
    buffers = groups.unique_buffers(module)
    wanted = [m.name for ms in by_parameter.values() for m in ms]
    wanted += [name for buffer in buffers for name in buffer.names]
    names = match_names(checkpoint.tensors, wanted)
    jobs, missing = [], []
    for members in by_parameter.values():
        stored = next((names[m.name] for m in members if m.name in names), None)
        if stored is None:
            missing.append(members[0].name)
            continue
        jobs.append(_job(checkpoint.tensors[stored], members, dtype, checkpoint.is_gguf))
    for buffer in buffers:
        stored = next((names[name] for name in buffer.names if name in names), None)
        if stored is not None:
            tensor = checkpoint.tensors[stored]
            jobs.append(_Job(tensor, [], tensor.dtype, buffer))
        elif buffer.persistent:
            missing.append(buffer.name)
    used = set(names.values())
    unexpected = sorted(set(checkpoint.tensors) - used)
    for job in jobs:
        taken = _take_scales(job, checkpoint, unexpected, dtype)
        unexpected = [name for name in unexpected if name not in taken]
    _report_keys(module, checkpoint, missing, unexpected, strict)
    _check_shapes(jobs, checkpoint.is_gguf)
    return sorted(jobs, key=lambda job: (job.stored.path, job.stored.offset))


def _job(
    stored: StoredTensor, members: list[groups.Member], dtype: torch.dtype | None, is_gguf: bool
) -> _Job:
    own = members[0].parameter.dtype
    if stored.block_type is not None:
        wide = dtype or (own if own in _ops.DECODED_DTYPES else torch.bfloat16)
        return _Job(stored, members, wide, rows=StoredRows(stored.block_type))
    if is_gguf and dtype is None and own.is_floating_point:
        dtype = own  # what small tensors were before they went into the file
    floating = stored.dtype.is_floating_point and dtype is not None
    return _Job(stored, members, dtype if floating and dtype is not None else stored.dtype)


def _take_scales(
    job: _Job, checkpoint: Checkpoint, unexpected: list[str], dtype: torch.dtype | None
) -> list[str]:
    """Gives a job the scales that the file has for it and the module has no place for."""
    if job.buffer is not None or job.stored.dtype.itemsize > 1 or not unexpected or job.rows:
        return []
    scales, taken = attach_scales(job.stored, checkpoint.tensors, unexpected)
    if scales is not None:
        job.rows = StoredRows(_ops.code_of(job.stored.dtype), scales.grid, scales.block)
        own = job.members[0].parameter.dtype
        job.dtype = dtype or (own if own in _ops.DECODED_DTYPES else torch.bfloat16)
    return taken


def _report_keys(
    module: nn.Module,
    checkpoint: Checkpoint,
    missing: list[str],
    unexpected: list[str],
    strict: bool,
) -> None:
    meta = [name for name, p in module.named_parameters() if p.is_meta and name in set(missing)]
    if (missing or unexpected) and (strict or meta):
        raise FormatError(
            f"{checkpoint.path!r} does not fit this {type(module).__name__}: "
            f"{len(missing)} missing ({', '.join(missing[:3]) or '-'}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3]) or '-'}). "
            "Build the module with the checkpoint's own configuration"
            + ("" if meta else ", or pass strict=False")
        )


def _check_shapes(jobs: list[_Job], is_gguf: bool) -> None:
    """Each tensor has its place's shape. GGUF files drop dimensions of 1, and get them back."""
    for job in jobs:
        if job.buffer is not None:
            shape = tuple(job.buffer.tensor.shape)
        else:
            shape = tuple(job.members[0].parameter.shape)
        if is_gguf and _without_ones(shape) == _without_ones(job.stored.shape):
            job.stored = replace(job.stored, shape=shape)
        if shape != job.stored.shape:
            raise FormatError(
                f"{job.stored.name!r}: the file has shape {job.stored.shape}, the module wants "
                f"{shape}; build the module with the checkpoint's own configuration"
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _check_no_meta_left(module: nn.Module, jobs: list[_Job]) -> None:
    filled = {id(job.buffer.tensor) for job in jobs if job.buffer is not None}
    empty = [
        buffer.name
        for buffer in groups.unique_buffers(module)
        if buffer.tensor.is_meta and id(buffer.tensor) not in filled
    ]
    if empty:
        raise PlacementError(
            f"{len(empty)} buffers are on the meta device and the checkpoint does not have them "
            f"({', '.join(map(repr, empty[:_SHOWN]))}); create the module so that only its "
            "parameters are on meta (for example "
            "accelerate.init_empty_weights(include_buffers=False)), or set the buffers first"
        )


@torch.inference_mode(False)
@torch.no_grad()
def _fill(
    module: Module, jobs: list[_Job], plan: Plan, options: Options, *, progress: bool | None
) -> Module:
    _check_no_meta_left(module, jobs)
    values = _bring_all(jobs, plan, progress)
    origins = {
        job.name: Origin(job.stored.path, job.stored.offset, job.stored.nbytes)
        for job in jobs
        if job.is_stored_form and job.stored.in_one_range and job.stored.nbytes
    }
    undo: _Undo = []
    try:
        _swap_in(module, jobs, values, torch.device(plan.compute), undo)
        found = groups.group_members(module)
        return distribution.place(module, plan, options, found, origins)
    except BaseException:
        for table, key, value in reversed(undo):
            table[key] = value
        raise


class _Budget:
    """Bytes of tensors on their way: at most `total` at one time.

    Room is given in the order of the tensors: what is needed first is not kept waiting by what is
    needed later, which would wait for it.
    """

    def __init__(self, total: int) -> None:
        self._left = total
        self._turn = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, turn: int, nbytes: int) -> bool:
        """Waits for room, and for all turns before. False when nobody wants anything any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._turn == turn and self._left >= nbytes)
            )
            self._left -= nbytes
            self._turn += 1
            self._changed.notify_all()
            return not self._closed

    def give(self, nbytes: int) -> None:
        """Gives room back."""
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@contextmanager
def _threads(budget: _Budget) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Threads that read, one that writes; all are gone afterwards, come what may."""
    with (
        ThreadPoolExecutor(_READERS, "distorch-read") as reader,
        ThreadPoolExecutor(1, "distorch-place") as placer,
    ):
        try:
            yield reader, placer
        finally:
            budget.close()
            for pool in (reader, placer):
                pool.shutdown(wait=False, cancel_futures=True)


def _bring_all(jobs: list[_Job], plan: Plan, progress: bool | None) -> list[torch.Tensor]:
    """Every job's weight at its place, in the order of the jobs."""
    compute = torch.device(plan.compute)
    show = sys.stderr.isatty() if progress is None else progress
    largest = max((_room(job, plan) for job in jobs), default=0)
    budget = _Budget(2 * largest)
    total = sum(job.stored.nbytes for job in jobs)
    values: list[Future[torch.Tensor]] = []
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not show) as bar,
        _threads(budget) as (reader, placer),
    ):
        reads: list[Future[torch.Tensor | None] | None] = [
            reader.submit(_read, job, plan, budget, turn) for turn, job in enumerate(jobs)
        ]
        for job in jobs:  # while the first are read
            if job.at_fetch:
                job.terms = low_rank_terms(job.patches, kept=True)
        for index, job in enumerate(jobs):
            read = reads[index]
            assert read is not None
            value = read.result()
            if value is not None and not job.is_stored_form:
                value = _made(job, value, compute)
            values.append(placer.submit(_place, job, value, plan, budget))
            reads[index] = read = value = None  # nobody but the placer holds it now
            for placed in values[-_PLACED_LATELY:]:
                if placed.done():
                    placed.result()  # its error is known now, not at the end
            bar.update(job.stored.nbytes)
        return [value.result() for value in values]


def _room(job: _Job, plan: Plan) -> int:
    """Bytes that it takes on its way, above those that stay."""
    stays_where_read = plan.compute == plan.placement[job.name] == "cpu"
    if stays_where_read and job.stored.nbytes == job.nbytes:
        return 0
    return max(job.stored.nbytes, job.nbytes)


def _stays_in_file(job: _Job, plan: Plan) -> bool:
    """Whether the checkpoint itself is the donor."""
    ranged = job.stored.in_one_range and job.stored.nbytes > 0
    return plan.placement[job.name] == "disk" and job.is_stored_form and ranged


def _read(job: _Job, plan: Plan, budget: _Budget, turn: int) -> torch.Tensor | None:
    stays = _stays_in_file(job, plan)
    if not budget.take(turn, 0 if stays else _room(job, plan)):
        raise RuntimeError("loading has ended")
    return None if stays else job.stored.read()


def _made(job: _Job, stored: torch.Tensor, compute: torch.device) -> torch.Tensor:
    """The weight itself, where it is not kept as the file has it."""
    if not job.patches and job.rows is None:
        return stored.to(job.dtype)
    shape = job.stored.shape
    return merged_value(job.patches, stored, job.rows, job.result_dtype, compute, shape=shape)


def _place(job: _Job, value: torch.Tensor | None, plan: Plan, budget: _Budget) -> torch.Tensor:
    """The weight at its place; `value` None: it stays in the file."""
    compute, target = torch.device(plan.compute), plan.placement[job.name]
    stored = job.stored
    if value is None:
        shape = (stored.nbytes,) if stored.block_type else stored.shape
        placed = _ops.shard_file(
            stored.path, stored.offset, shape, stored.dtype, compute=compute, name=job.name
        )
        return _decoded(job, placed)
    try:
        if stored.nbytes == 0:
            return value.to(compute)
        decodes = job.rows is not None and job.is_stored_form
        if target == plan.compute and not decodes and not (job.at_fetch and job.patches):
            return value.to(compute)
        return _decoded(job, _donors.shard_on(target, value, compute, job.name))
    finally:
        budget.give(_room(job, plan))


def _decoded(job: _Job, placed: torch.Tensor) -> torch.Tensor:
    """A weight in the form of the file, with what its fetches have to do."""
    if not job.is_stored_form:
        return placed
    if job.rows is not None:
        placed = with_rows(placed, job.rows, job.result_dtype, job.stored.shape, job.name)
    terms = job.terms
    if terms is None or not len(terms):
        return placed
    if job.rows is None and job.stored.dtype in _ops.DECODED_DTYPES:
        return _ops.patched(placed, terms)
    if job.rows is None:
        rows = StoredRows(_ops.code_of(job.stored.dtype))
        placed = with_rows(placed, rows, job.result_dtype, job.stored.shape, job.name)
    _ops.set_patches(placed, terms)
    return placed


def _swap_in(
    module: nn.Module,
    jobs: list[_Job],
    values: list[torch.Tensor],
    compute: torch.device,
    undo: _Undo,
) -> None:
    """New parameters in every place; what was there is noted in `undo` first."""
    for job, value in zip(jobs, values, strict=True):
        if job.buffer is not None:
            undo += [(o._buffers, key, job.buffer.tensor) for o, key in job.buffer.places]
            job.buffer.put(value.to(compute))
            continue
        old = job.members[0].parameter
        trains = old.requires_grad and _can_train(value)
        if groups.has_bytes(old):
            fresh = as_parameter(value, trains, old)
        else:  # a wrapper of other tensors, which the file's replaces
            fresh = nn.Parameter(value, requires_grad=trains)
        if _ops.is_sharded(fresh):
            attach_behaviour(fresh)
        for member in job.members:
            undo.append((member.owner._parameters, member.key, old))
            member.owner._parameters[member.key] = fresh


def _can_train(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
