# SPDX-License-Identifier: Apache-2.0
"""What is known of a distributed module's LoRAs: its originals, and what is on them.

Note [Originals]
The result of a merge is always computed from a weight's original, never by taking a delta back. A
module that was loaded has its originals in the checkpoint; of one that was distributed, those that
get patched are kept where they were. What a weight has on it now is written down weight by weight
as soon as it is there, so that an interrupt between two of them leaves nothing unknown.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from distorch import _ops
from distorch._behaviour import copy_of_donor
from distorch.errors import FetchError, FormatError, PlacementError, SpecError
from distorch.formats.checkpoint import Opened
from distorch.formats.plain_names import base_name
from distorch.formats.scales import own_scales
from distorch.formats.stored import StoredTensor
from distorch.formats.unchanged import stamp_of
from distorch.lora import (
    Applied,
    LoraReader,
    LoraSource,
    Patches,
    ResolvedLora,
    StoredRows,
    WeightKinds,
    patches_of_tied,
)
from distorch.lora.files import version_of
from distorch.patching.widths import input_layers
from distorch.runtime.distribution import known_distribution
from distorch.runtime.groups import Member, has_bytes, named_members
from distorch.runtime.options import dtype_of

LoraMode = Literal["merge", "fetch", "background"]


@dataclass(frozen=True)
class PatchOptions:
    """How patches are put on: `mode` "merge" | "fetch" | "background"; `dtype` of patched weights
    whose base is narrower than 16 bits (None: the module's own, else bfloat16; "base": rounded
    back, where they are plain numbers without scales).
    """

    mode: str = "merge"
    dtype: torch.dtype | str | None = None

    @staticmethod
    def checked(mode: str, dtype: torch.dtype | str | None) -> PatchOptions:
        """Raises SpecError on values that mean nothing."""
        if mode not in get_args(LoraMode):
            raise SpecError(f"lora_mode={mode!r}: expected 'merge', 'fetch' or 'background'")
        if dtype is not None and dtype != "base":
            dtype = dtype_of(dtype, "patched_dtype", "'bfloat16', 'float16', 'float32' or 'base'")
            if dtype not in _ops.DECODED_DTYPES:
                raise SpecError(
                    f"patched_dtype={dtype}: expected 'bfloat16', 'float16', 'float32' or 'base'"
                )
        if mode != "merge" and dtype == "base":
            raise SpecError("patched_dtype='base' needs lora_mode='merge'")
        return PatchOptions(mode, dtype)

    @property
    def at_fetch(self) -> bool:
        """Whether fetches patch what they can, for the time being or for good."""
        return self.mode != "merge"

    def check_rounds_to(self, rows: StoredRows | None, name: str) -> None:
        """SpecError where a patched weight is to be rounded to numbers that mean nothing alone."""
        if self.dtype == "base" and rows is not None:
            raise SpecError(
                f"patched_dtype='base': {name!r} is stored as {rows.code}, in blocks or with "
                "scales. Patched weights are not rounded to such numbers; expected 'bfloat16', "
                "'float16' or 'float32'"
            )

    def dtype_of(self, stored: torch.dtype, module_dtype: torch.dtype) -> torch.dtype:
        """What a patched weight is kept in."""
        if stored.itemsize > 1 or not (stored.is_floating_point or stored in INTEGERS):
            return stored
        if self.dtype == "base":
            return stored
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return module_dtype if module_dtype in _ops.DECODED_DTYPES else torch.bfloat16


INTEGERS = (torch.int8, torch.uint8)


def _seen(parameter: torch.Tensor) -> tuple[Any, ...]:
    """What changes when a parameter gets other values: in place, or by `.data =`."""
    version = version_of(parameter)
    if _ops.is_sharded(parameter):
        return version, _ops.state(parameter).id, parameter.shape
    where = parameter.data_ptr() if has_bytes(parameter) else 0
    return version, where, parameter.shape


@dataclass
class Original:
    """A weight's values before any patch: in a file, or kept. `dtype` what it is unpatched.

    `parameter`, and what was `seen` of it then, tell whether the module still has the values that
    were put there: vocabularies are resized and layers replaced without a word to us.
    """

    stored: StoredTensor | None
    rows: StoredRows | None
    dtype: torch.dtype
    kept: torch.Tensor | None = None
    parameter: weakref.ref[torch.Tensor] | None = None
    seen: tuple[Any, ...] = ()
    opened: Mapping[str, Opened] = field(default_factory=dict)  # its files, when it was loaded
    touched: bool = False  # since a change of its patches began, the weight may be another one

    def check_files(self) -> None:
        """FetchError if a file that has it is not the one that was loaded."""
        if self.stored is None or self.stored.data is not None:
            return
        sources = [piece.source for piece in self.stored.pieces] or [self.stored]
        for path in {source.path for source in sources} & self.opened.keys():
            try:
                unchanged = stamp_of(path) == self.opened[path].stamp
            except FormatError:  # it is gone
                unchanged = False
            if not unchanged:
                raise FetchError(
                    f"{path!r} was replaced or written to since the model was loaded: the weights "
                    "that were under its LoRAs are not there any more. Load the model again"
                )

    def put(self, parameter: torch.Tensor) -> None:
        """Notes that `parameter` has values that were made of these."""
        self.parameter, self.seen = weakref.ref(parameter), _seen(parameter)

    def is_of(self, parameter: torch.Tensor) -> bool:
        """Whether `parameter` has those values still, as far as torch shows it: what is written
        through `.data`, it hides.
        """
        known = self.parameter() if self.parameter is not None else None
        return known is parameter and self.seen == _seen(parameter)

    def merges_later(self, options: PatchOptions) -> bool:
        """Whether a patch that fetches put on now will be merged: not where that would widen."""
        plain = self.rows is None and self.dtype in _ops.DECODED_DTYPES
        return options.mode == "background" and plain

    def copy(self, memo: dict[int, Any]) -> Original:
        """For a copy of the weight, which `memo` knows. What is kept is copied, too: the first may
        be written to.
        """
        kept = self.kept
        if kept is not None:
            kept = copy_of_donor(kept, {}) if _ops.is_sharded(kept) else kept.clone()
        copied = dataclasses.replace(self, kept=kept, parameter=None)
        known = self.parameter() if self.parameter is not None else None
        if known is not None and self.is_of(known) and id(known) in memo:
            copied.put(memo[id(known)])
        return copied

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
    widened: dict[str, int] = field(default_factory=dict)  # columns that a weight had before

    def copy(self, memo: dict[int, Any]) -> Patching:
        """For a copy of the module; `memo` has the copies of its weights."""
        originals = {name: known.copy(memo) for name, known in self.originals.items()}
        applied = {name: list(entries) for name, entries in self.applied.items()}
        return Patching(
            self.reader, self.options, originals, applied, list(self.loras), dict(self.widened)
        )

    def width_of(self, members: Sequence[Member], own: int, patches: Patches) -> int | None:
        """Columns that an input layer's weight gets with these patches; None: its `own`."""
        names = names_of(members)
        if names[0] not in self.reader.kinds.inputs:
            return None
        width = patches.width(names)
        return width if width > own else None

    @contextmanager
    def moving(self, module: nn.Module) -> Iterator[None]:
        """The module's weights go elsewhere meanwhile, and are the same afterwards.

        Ctrl-C may come when they are there already. So it is always looked up where they are, and
        done anew if Ctrl-C comes right then.
        """
        here = {base_name(m.name): m.parameter for m in named_members(module)}
        same = [
            name
            for name, original in self.originals.items()
            if name in here and original.is_of(here[name])
        ]
        try:
            yield
        finally:
            stopped = None
            while True:
                try:
                    self._put_all(module, same)
                    break
                except KeyboardInterrupt as error:
                    stopped = error
            if stopped is not None:
                raise stopped

    def _put_all(self, module: nn.Module, names: Iterable[str]) -> None:
        there = {base_name(m.name): m.parameter for m in named_members(module)}
        for name in names:
            self.originals[name].put(there[name])

    def sources(self) -> list[tuple[LoraSource, float]]:
        """The LoRAs that are on the module, as `set_loras` takes them."""
        return [(lora.source, strength) for lora, strength in self.loras]

    def _wider(self, lora: ResolvedLora) -> dict[str, dict[str, tuple[int, int]]]:
        """Which layers it makes wider: columns of their own, and those that it has."""
        found = {}
        for patch in lora.patches:
            own, columns = self.widened.get(patch.weight), patch.kind.columns() or 0
            if own is not None and columns > own:
                found[patch.weight] = own, columns
        return {"wider": found} if found else {}

    def rows(self) -> list[dict[str, Any]]:
        """One entry per LoRA, for reports."""
        return [
            {
                "lora": lora.label.strip("'\""),  # without the quotes that errors have
                "strength": strength,
                "weights": len({patch.weight for patch in lora.patches}),
                "unmatched": lora.left_out,
                "for other models": len(lora.elsewhere),
                **self._wider(lora),
            }
            for lora, strength in self.loras
        ]


def names_of(members: Sequence[Member]) -> list[str]:
    """All names of a weight, as LoRAs have them."""
    return [base_name(member.name) for member in members]


def shapes_of(
    module: nn.Module, widened: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, tied ones under each of their names; of `widened` ones, the
    shape with the columns that they had before.
    """
    shapes = {base_name(m.name): tuple(m.parameter.shape) for m in named_members(module)}
    own = (widened or {}).items()
    return shapes | {name: (shapes[name][0], n) for name, n in own if name in shapes}


def patches_on(members: Sequence[Member], patches: Patches) -> Applied:
    """What changes the weight that these names stand for. FormatError if they are tied, and are
    not to be changed alike.
    """
    views = {(p.shape, p.stride(), p.storage_offset()) for p in (m.parameter for m in members)}
    if len(views) > 1:
        if patches.of(names_of(members)):
            raise PlacementError(
                f"{members[0].name!r} shares its bytes with weights of another shape or order: "
                "patch them as plain tensors, after distorch.undistribute(model)"
            )
        return []
    ends: dict[tuple[int, str], list[str]] = {}
    for member in members:  # one module may have several names
        ends.setdefault((id(member.owner), member.key), []).append(base_name(member.name))
    shape = tuple(members[0].parameter.shape)
    if len(shape) == 2:  # patches may make it wider
        shape = shape[0], max(shape[1], *(patches.width(names) for names in ends.values()))
    return patches_of_tied(patches, list(ends.values()), shape)


def _weight_kinds_of(module: nn.Module) -> WeightKinds:
    """What its modules say of the order of their weights' dimensions."""
    transposed, experts, inputs = set(), set(), set()
    takes_input = set(input_layers(module))
    for member in named_members(module):
        owner, dims = member.owner, member.parameter.dim()
        says = getattr(owner, "is_transposed", None) if dims == 3 else None  # transformers' experts
        if says is True or (type(owner).__name__ == "Conv1D" and dims == 2):
            transposed.add(base_name(member.name))
        elif says is False and getattr(owner, "is_concatenated", False):
            experts.add(base_name(member.name))
        elif owner in takes_input and member.key == "weight":
            inputs.add(base_name(member.name))
    return WeightKinds(frozenset(transposed), frozenset(experts), frozenset(inputs))


def widened_in(module: nn.Module) -> Mapping[str, int]:
    """Weights of a module that LoRAs make wider now, with the columns that they had before."""
    known = known_distribution(module)
    return {} if known is None or known.patching is None else known.patching.widened


def new_reader(module: nn.Module, widened: Mapping[str, int] | None = None) -> LoraReader:
    """A reader of LoRAs for this module, of which some weights may be `widened` (see there)."""
    return LoraReader(shapes_of(module, widened), _weight_kinds_of(module))


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
