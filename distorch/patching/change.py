# SPDX-License-Identifier: Apache-2.0
"""set_loras: another set of LoRAs, or other strengths, on a distributed module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from distorch.display.progress import Progress, check_progress, progress_of
from distorch.errors import PlacementError, warn_at_caller
from distorch.formats.plain_names import base_name
from distorch.formats.stored import StoredTensor
from distorch.lora import Applied, LoraSource, Patches
from distorch.machine import machine
from distorch.patching.background import merge_in_background
from distorch.patching.forms import Work, reads_file, redo
from distorch.patching.reading import ReadAhead
from distorch.patching.state import (
    LoraMode,
    Patching,
    PatchOptions,
    check_plain_numbers,
    names_of,
    new_reader,
    patches_on,
    shapes_of,
)
from distorch.patching.widths import follow, input_layers
from distorch.planner import Plan
from distorch.runtime import distribution, placing
from distorch.runtime.changes import alone, at_rest
from distorch.runtime.groups import Group, group_members, has_bytes
from distorch.runtime.staging import current_place

Module = TypeVar("Module", bound=nn.Module)
_SHOWN = 3


def set_loras(
    module: Module,
    loras: Sequence[tuple[LoraSource, float]],
    *,
    strict_loras: bool = True,
    lora_mode: LoraMode | None = None,
    patched_dtype: torch.dtype | str | None = None,
    progress: Progress = None,
) -> Module:
    """Puts these LoRAs, and no others, on a distributed module.

    A patched weight is `round_once(float32(W) + sum of strength * delta)`, the same bits in every
    mode. Only weights for which something changes are computed, from their original bytes. Forward
    passes that other threads have begun end first, and new ones wait.

    Args:
        module: A distributed module.
        loras: Pairs of a LoRA and its strength, in the order in which they are added. A LoRA is a
            file, an adapter's folder, or a state dict. Leave the tensors of a state dict as they
            are while they are on. [] takes all LoRAs off.
        strict_loras: Whether every key of a LoRA has to fit a weight.
        lora_mode: "merge" writes the results to where the weights are. "fetch" patches a weight
            whenever it is fetched, so that a new strength moves no bytes. "background" begins like
            "fetch" and merges while the model is used, but for 8-bit and quantised weights and what
            is on disk (see `finish_merging`). If not given: as before.
        patched_dtype: The dtype of weights of 8 bits or less that a LoRA is merged into; 16 bits by
            default. Plan and report count the growth, even where it is more than the share;
            `redistribute` then places anew.
        progress: As in `distribute`.

    Returns:
        The module itself.

    Raises:
        FormatError: A LoRA is missing, damaged, or fits nothing.
        SpecError: An argument is wrong.
        PlacementError: The module is not distributed, a weight cannot be patched, or another thread
            does not come to rest within a minute. Or, after another error, a weight could not be
            put back: the error names it.
        FetchError: Original bytes could not be read, for example because their file was replaced.

    After any of them the module has the LoRAs that it had. After an interrupt it has those, or the
    new ones if it came at the very end.
    """
    distribution.distribution_of(module)  # the usual mistake, before it waits for anything
    check_progress(progress)
    with alone(module), distribution.nothing_merging(module):
        state = distribution.distribution_of(module)
        known = state.patching
        if known is None:
            known = Patching(new_reader(module), PatchOptions())
        before = known.options
        options = PatchOptions.checked(
            before.mode if lora_mode is None else lora_mode,
            before.dtype if patched_dtype is None else patched_dtype,
        )
        if known.reader.shapes != shapes_of(module, known.widened):
            # Adapters came, or a vocabulary grew.
            known.reader = new_reader(module, known.widened)
        patches, found = known.reader.read(loras, strict_loras)
        _warn_of_adapters(module)
        changes = _changes(group_members(module), patches, known, options)
        _check_unchanged(changes, known, options)
        _check_widths(changes, module)
        state.patching = known
        # What becomes resident may be trained later, in any thread: no tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad(), at_rest(module, whole_passes=True):
            machine.synchronize_all(_places(changes))
            try:
                _apply(changes, known, Work(options, state.plan), module, progress)
                known.options, known.loras = options, found
            finally:
                machine.synchronize_all(_places(changes))
        placing.refresh(module)
        if options.mode == "background":
            merge_in_background(module)
    return module


def _warn_of_adapters(module: nn.Module) -> None:
    """Warns of active adapters of PEFT: what they add, they add to what `set_loras` has merged."""
    active: dict[str, None] = {}
    for layer in module.modules():
        if hasattr(layer, "base_layer") and not getattr(layer, "disable_adapters", True):
            active |= dict.fromkeys(map(str, getattr(layer, "active_adapters", ())))
    if active:
        warn_at_caller(
            f"this {type(module).__name__} has adapters of PEFT ({', '.join(active)}), which stay "
            "on. If they are the same LoRAs, their changes now count twice: take them off with "
            "pipe.unload_lora_weights(), or with PEFT's unload()",
            UserWarning,
        )


@dataclass
class _Change:
    group: Group
    old: Applied
    new: Applied
    old_options: PatchOptions
    old_width: int | None = None  # columns, if not the weight's own
    new_width: int | None = None

    @property
    def widens(self) -> bool:
        """Whether the weight is wider than its own, before or after."""
        return self.old_width is not None or self.new_width is not None


def _places(changes: Iterable[_Change]) -> list[str]:
    """Where the weights are now: "cpu", "disk", devices."""
    return [current_place(change.group.first) for change in changes]


def _same(old: Applied, new: Applied) -> bool:
    return [(id(p), s) for p, s in old] == [(id(p), s) for p, s in new]


def _changes(
    groups: Iterable[Group], patches: Patches, known: Patching, options: PatchOptions
) -> list[_Change]:
    changes = []
    for group in groups:
        old = known.applied.get(base_name(group.name), [])
        new = patches_on(group.members, patches)
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
        if new and original is not None:
            options.check_rounds_to(original.rows, group.name)
        columns = int(group.first.shape[1]) if group.first.dim() == 2 else 0
        own = known.widened.get(base_name(group.name), columns)
        old_width = columns if columns > own else None
        width = known.width_of(group.members, own, patches)
        respelled = options != known.options and (old or new)
        if not _same(old, new) or respelled or old_width != width:
            changes.append(_Change(group, old, new, known.options, old_width, width))
    return changes


def _check_unchanged(changes: Iterable[_Change], known: Patching, options: PatchOptions) -> None:
    """Refuses changes that would start from other values than the originals: PlacementError if
    somebody has written to a patched weight, FetchError if a file with originals was replaced.
    """
    for change in changes:
        group = change.group
        original = known.originals.get(base_name(group.name))
        if len({(m.parameter.dtype, tuple(m.parameter.shape)) for m in group.members}) > 1:
            raise PlacementError(
                f"{group.name!r} shares its bytes with weights of another shape: patch them as "
                "plain tensors, after distorch.undistribute(model)"
            )
        if original is not None and (
            change.widens or reads_file(group, change.new, original, options)
        ):
            original.check_files()
        if original is None or original.is_of(group.first):
            continue
        if change.old or change.old_width is not None:
            raise PlacementError(
                f"{group.name!r} was written to, or is another parameter, since its LoRAs were put "
                "on: set_loras computes weights from their originals, which would undo that. Save "
                "the model's state_dict(), and load it as a checkpoint"
            )
        known.originals.pop(base_name(group.name))  # unpatched: its values now are the original


def _check_widths(changes: Iterable[_Change], module: nn.Module) -> None:
    """PlacementError if a layer gets another width, and something that has its present width is
    around it.
    """
    for change in changes:
        if change.old_width == change.new_width:
            continue
        owners = {member.owner for member in change.group.members}
        if not owners <= set(input_layers(module)):
            raise PlacementError(
                f"{change.group.name!r} would get another width, and its layer is not the model's "
                "own any more, or in_channels of the model was changed. An adapter around it was "
                "made for the present width: take that off first, by pipe.unload_lora_weights() "
                "or PEFT's unload()"
            )


def _apply(
    changes: list[_Change], known: Patching, work: Work, module: nn.Module, progress: Progress
) -> None:
    """All changes, or none: what was done is taken back on an error or an interrupt."""
    total = sum(change.group.nbytes for change in changes)
    wide = {name for change in changes if change.widens for name in names_of(change.group.members)}
    reads = [_read_ahead(change, known, work.options) for change in changes]
    begun: list[_Change] = []
    try:
        with progress_of(progress, total, "patching") as done, ReadAhead(reads) as originals:
            for change in changes:
                values = originals.next()
                original = known.originals.get(base_name(change.group.name))
                if original is not None:
                    original.touched = False
                begun.append(change)
                redo(change.group, change.new, known, work, values, width=change.new_width)
                done(change.group.nbytes)
        follow(module, wide)
    except BaseException as error:
        try:
            _take_back(begun, known, work.plan, error)
        finally:
            follow(module, wide)
        raise


def _take_back(begun: list[_Change], known: Patching, plan: Plan, error: BaseException) -> None:
    """The weights as they were, all that can be. PlacementError if one cannot."""
    lost: list[str] = []
    for change in reversed(begun):
        original = known.originals.get(base_name(change.group.name))
        if original is not None and not original.touched:
            continue  # if its original could not be read, that would fail again
        work = Work(change.old_options, plan)
        try:
            redo(change.group, change.old, known, work, width=change.old_width)
        except Exception:
            lost.append(change.group.name)
    if lost:
        raise PlacementError(
            f"after an error ({error}), {', '.join(lost[:_SHOWN])} could not be put back to the "
            "LoRAs from before: load the model again"
        ) from error


def _read_ahead(change: _Change, known: Patching, options: PatchOptions) -> StoredTensor | None:
    """What a merge of this change reads from a file, if it does."""
    original = known.originals.get(base_name(change.group.name))
    if original is None or original.kept is not None or not change.new:
        return None
    return None if options.at_fetch or change.widens else original.stored
