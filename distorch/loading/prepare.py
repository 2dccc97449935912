# SPDX-License-Identifier: Apache-2.0
"""Before a load moves anything: files are opened, names are matched, every weight has its place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from distorch import _ops
from distorch.display.progress import Progress
from distorch.errors import FormatError, SpecError, warn_at_caller
from distorch.formats.checkpoint import Checkpoint, Opened, open_checkpoint
from distorch.formats.naming import fit_names
from distorch.formats.plain_names import base_name
from distorch.formats.verify import compare_whole, verifying
from distorch.loading.job import Job
from distorch.loading.match import check_no_meta_left, match, tie_again
from distorch.lora import LoraSource, Patches, are_products
from distorch.patching import (
    LoraMode,
    Patching,
    PatchOptions,
    check_plain_numbers,
    new_reader,
    patches_on,
    widened_in,
)
from distorch.planner import Inventory, Plan
from distorch.rehearsal import arrangement
from distorch.runtime import groups, planning
from distorch.runtime.options import (
    Options,
    PlacementOptions,
    check_module,
    check_one_placement,
    dtype_of,
)

Resident = Literal["quantised", "dequantised", "quantized", "dequantized"]


OF_DISTRIBUTE = frozenset(PlacementOptions.__annotations__)


class FillOptions(PlacementOptions, total=False):
    """Options of everything that fills modules: how LoRAs go on, and what stays narrow."""

    strict_loras: bool
    lora_mode: LoraMode
    patched_dtype: torch.dtype | str | None
    resident: Resident
    verify: bool


class LoadOptions(FillOptions, total=False):
    """The options of `load`, as documented there."""

    loras: Sequence[tuple[LoraSource, float]]
    strict: bool
    dtype: torch.dtype | str | None


OF_LOAD = tuple(name for name in LoadOptions.__annotations__ if name not in OF_DISTRIBUTE)


@dataclass(frozen=True)
class Request:
    """What `load` was asked for; `placing` has the options of `distribute` by name."""

    spec: str | None = None
    plan: Plan | None = None
    virtual_vram: str | int | None = None
    donor: str | None = None
    placing: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[tuple[LoraSource, float]] = ()
    strict: bool = True
    strict_loras: bool = True
    lora_mode: LoraMode = "merge"
    patched_dtype: torch.dtype | str | None = None
    dtype: torch.dtype | str | None = None
    resident: str = "quantised"
    verify: bool = False
    known: Sequence[str] = ()  # arguments that may have been meant where an option is none

    @classmethod
    def of(
        cls,
        spec: str | None,
        virtual_vram: str | int | None,
        donor: str | None,
        options: Mapping[str, Any],
        known: Sequence[str],
        **decided: Any,
    ) -> Request:
        """A request by the names of options. `known`: the caller's own arguments. What it has
        `decided` itself is no option of its.
        """
        placing = dict(options)
        mine = [name for name in OF_LOAD if name in placing and name not in decided]
        own = {name: placing.pop(name) for name in mine}
        return cls(spec, None, virtual_vram, donor, placing, known=known, **own, **decided)

    @classmethod
    def for_new_module(
        cls,
        spec: str | None,
        virtual_vram: str | int | None,
        donor: str | None,
        options: Mapping[str, Any],
        known: Sequence[str],
        *,
        loras: Sequence[tuple[LoraSource, float]] = (),
    ) -> Request:
        """As `of`, for a module that is made for its file: what `distorch.integrations` load.

        Spec and `min_bytes` are "auto" if nothing else is said. The module has its dtype already,
        and the file may have tensors that it does not want.
        """
        return cls.of(
            "auto" if spec is None and virtual_vram is None else spec,
            virtual_vram, donor, {"min_bytes": "auto", **options}, known,
            loras=loras, strict=False, dtype="module",
        )  # fmt: skip

    def options(self, before: Options | None = None) -> Options:
        """Those of `distribute`, checked; those that are not given are as `before`. SpecError."""
        check_one_placement(self.spec, self.plan, self.virtual_vram, self.donor)
        options = Options.of(self.placing, self.known, before)
        return options if self.plan is None else options.as_planned(self.plan, self.placing)

    def check(self) -> Options:
        """What can be said before a file is opened; the options of `distribute`.

        Raises SpecError, PlacementError.
        """
        options = self.options()
        self.floating_dtype()
        self.widens()
        self.verifies()
        PatchOptions.checked(self.lora_mode, self.patched_dtype)
        if self.plan is None:
            planning.Wish.of(
                self.spec, options.compute, planning.devices_for((), None),
                self.virtual_vram, self.donor,
            ).check()  # fmt: skip
        return options

    def floating_dtype(self) -> torch.dtype | Literal["module"] | None:
        """What floating weights become. SpecError."""
        if self.dtype is None or self.dtype == "module":
            return self.dtype  # type: ignore[return-value]
        dtype = dtype_of(
            self.dtype, "dtype", "a floating dtype, such as torch.bfloat16, or 'module'"
        )
        if not dtype.is_floating_point:
            raise SpecError(f"dtype={dtype}: expected a floating dtype, such as torch.bfloat16")
        return dtype

    def widens(self) -> bool:
        """Whether narrow weights are decoded for good where they stay resident. SpecError."""
        spelled = str(self.resident).lower().replace("quantiz", "quantis")
        if spelled not in ("quantised", "dequantised"):
            raise SpecError(f"resident={self.resident!r}: expected 'quantised' or 'dequantised'")
        return spelled == "dequantised"

    def verifies(self) -> bool:
        """Whether bytes of files are compared with their checksums. SpecError."""
        if not isinstance(self.verify, bool):
            raise SpecError(f"verify={self.verify!r}: expected True or False")
        return self.verify

    def verifying(
        self, file: str | os.PathLike[str], progress: Progress
    ) -> AbstractContextManager[object]:
        """What opens and loads a file goes into this: see `verify.verifying`."""
        return verifying(file, progress) if self.verifies() else nullcontext()

    def compare(self, file: str | os.PathLike[str], progress: Progress) -> None:
        """Compares a whole file now, if that was asked for: others are about to read it."""
        if self.verifies():
            compare_whole(file, progress)


@dataclass(frozen=True)
class Matched:
    """A checkpoint and a module, weight by weight; and what they are together, for a plan."""

    jobs: list[Job]
    inventory: Inventory
    widens: bool
    patching: Patching
    opened: dict[str, Opened]

    def placed(self, plan: Plan, options: Options) -> Ready:
        """The same, by a plan that was made for it."""
        self._narrow_elsewhere(plan)
        return Ready(
            self.jobs,
            plan.resized({job.name: job.nbytes for job in self.jobs}),
            options,
            self.patching,
            self.opened,
        )

    def _narrow_elsewhere(self, plan: Plan) -> None:
        """Once it is known who stays on the compute device, all others are as narrow as in the
        file.
        """
        for job in self.jobs if self.widens else ():
            job.widened = job.widened and plan.placement.get(job.name) == plan.compute


@dataclass(frozen=True)
class Ready:
    """A load that is decided: the work, where it goes, and what is to be remembered."""

    jobs: list[Job]
    plan: Plan
    options: Options
    patching: Patching
    opened: dict[str, Opened]


@contextmanager
def ties_kept(module: nn.Module, *, after_error: bool) -> Iterator[None]:
    """The module's parameters are the same objects afterwards, or at least after an error."""
    before = [(part, dict(part._parameters)) for part in module.modules()]
    done = False
    try:
        yield
        done = True
    finally:
        for part, parameters in before if not done or not after_error else ():
            part._parameters.update(parameters)


# A path, or what `open_for` made of it.
Source = str | os.PathLike[str] | Checkpoint


def open_for(module: nn.Module, file: str | os.PathLike[str]) -> Checkpoint:
    """A file's tensors under the module's names. Reads headers only. FormatError."""
    return fit_names(open_checkpoint(file), module)


def prepare(module: nn.Module, file: Source, request: Request) -> Ready:
    """Decides everything about a load. Raises SpecError, FormatError, PlacementError."""
    check_module(module)
    with ties_kept(module, after_error=True):
        return _prepared(module, file, request)


def _prepared(module: nn.Module, file: Source, request: Request) -> Ready:
    options = request.options()
    matched = match_up(module, file, request)
    if request.plan is None:
        plan = planning.plan_inventory(
            matched.inventory, request.spec, options, planning.devices_for((), None),
            virtual_vram=request.virtual_vram, donor=request.donor, arrange=arrangement(options),
        )  # fmt: skip
        ready = matched.placed(plan, options)
    else:
        ready = matched.placed(request.plan, options)
        planning.check_plan_fits(request.plan, inventory_of(module, matched.jobs))
    if problem := ready.plan.over_budget():
        warn_at_caller(problem)
    return ready


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors about what is in a file name the file, too."""
    try:
        yield
    except FormatError as error:
        if path in str(error):
            raise
        raise FormatError(f"{path!r}: {error}") from error.__cause__


def match_up(module: nn.Module, file: Source, request: Request) -> Matched:
    """Which stored tensor goes where, and what is to be done to it. Reads no weights.

    May tie parameters of the module. Raises SpecError, FormatError, PlacementError.
    """
    dtype, widens = request.floating_dtype(), request.widens()
    patch_options = PatchOptions.checked(request.lora_mode, request.patched_dtype)
    checkpoint = file if isinstance(file, Checkpoint) else open_for(module, file)
    if request.verifies():
        checkpoint.check_verified()
    tie_again(module, checkpoint)
    with _naming(checkpoint.path):
        jobs = match(module, checkpoint, request.strict, dtype)
    check_no_meta_left(module, jobs)
    reader = new_reader(module, widened_in(module))
    patches, found = reader.read(request.loras, request.strict_loras)
    patching = Patching(reader, patch_options, loras=found)
    _assign(jobs, patches, patching)
    for job in jobs if widens else ():
        job.widened = job.rows is not None  # as it would be on the compute device
    return Matched(jobs, inventory_of(module, jobs), widens, patching, checkpoint.opened)


def _assign(jobs: list[Job], patches: Patches, patching: Patching) -> None:
    """Tells each job what is to be added to it."""
    options = patching.options
    for job in jobs:
        if job.buffer is not None:
            continue
        job.patches = patches_on(job.members, patches)
        if len(job.stored.shape) == 2:
            job.columns = patching.width_of(job.members, job.stored.shape[1], patches)
        if job.columns is not None:
            own = job.stored.shape[1]
            patching.widened |= {base_name(name): own for name in job.names}
        if job.patches or job.columns is not None:
            if job.rows is None:
                check_plain_numbers(job.members[0], job.stored.dtype)
            narrow = job.stored.dtype if job.dtype.itemsize == 1 or job.rows else job.dtype
            options.check_rounds_to(job.rows, job.name)
            job.patched_dtype = options.dtype_of(narrow, job.module_dtype)
            fits = job.rows is not None or job.dtype == job.stored.dtype
            known = job.patched_dtype in _ops.DECODED_DTYPES
            products = are_products(job.patches, job.rows, job.stored.shape)
            same_width = job.columns is None
            job.at_fetch = options.at_fetch and fits and known and products and same_width


def inventory_of(module: nn.Module, jobs: list[Job]) -> Inventory:
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
