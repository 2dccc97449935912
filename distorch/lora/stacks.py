# SPDX-License-Identifier: Apache-2.0
"""LoRAs on parameters that are no layer's weight: above all a layer's experts, kept as a stack.

Note [How PEFT names and stacks factors]
PEFT puts such a LoRA around the module that has the parameter (`target_parameters`). Its keys name
the module, not the parameter. Of a module with several such parameters, the last one has the
module's own name, and each earlier one has one more ".base_layer" behind it.

The factors of a stack [experts, a, b] are two matrices: A [rank * experts, in], whose rows are
expert by expert, and B [out, rank * experts], whose columns are rank by rank. Which of a and b is
"in" changed twice. Until 0.18 it is a. In 0.19.0 it is b where the module says `is_transposed`,
and a elsewhere; since 0.19.1 it is the other way round. Where a and b differ, the factors show it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from distorch.errors import FormatError
from distorch.lora.assemble import Scaling
from distorch.lora.configuration import names_parameter
from distorch.lora.files import LoraFile
from distorch.lora.kinds import Kind
from distorch.lora.other_names import Shapes
from distorch.lora.products import LowRankKind, StackedKind
from distorch.lora.spellings import Group
from distorch.lora.targets import Targets

_LEVEL = ".base_layer"
_FIRST_SWAP, _SECOND_SWAP = (0, 19, 0), (0, 19, 1)


@dataclass(frozen=True)
class Stack:
    """What a stem means: factors for one parameter of a module."""

    parameter: str  # its full name in our module
    key: str  # its name as the file's configuration has it
    turned: bool | None  # whether "in" is the stack's second dimension; None: not known


def without_levels(stem: str) -> str:
    """The module that a stem is for one of the parameters of."""
    while stem.endswith(_LEVEL):
        stem = stem.removesuffix(_LEVEL)
    return stem


def stacks_of(file: LoraFile, groups: Mapping[str, Group], targets: Targets) -> dict[str, Stack]:
    """The stems that are for parameters of modules. FormatError where the file does not say for
    which.
    """
    by_module: dict[str, dict[str, Group]] = {}
    for stem, group in groups.items():
        if {"up", "down"} <= group.parts.keys():
            by_module.setdefault(without_levels(stem), {})[stem] = group
    found: dict[str, tuple[str, str]] = {}  # stem -> parameter, and its name in the file
    for module, entries in by_module.items():
        first_to_last = dict(sorted(entries.items(), key=lambda entry: -len(entry[0])))
        parameters = _parameters_of(file, module, first_to_last, targets)
        for stem, parameter in zip(first_to_last, parameters, strict=False):
            found[stem] = parameter, f"{module}.{parameter.rpartition('.')[2]}"
    shown = {
        stem: turned
        for stem, (parameter, _) in found.items()
        if (turned := _shown(groups[stem].parts, targets.shapes[parameter])) is not None
    }
    stacks = {}
    for stem, (parameter, key) in found.items():
        turned = shown.get(stem)
        if turned is None and len({*shown.values()}) == 1:  # the file's other factors show it
            turned = next(iter(shown.values()))
        elif turned is None:
            version = file.configuration.of(stem)[0].get("peft_version")
            experts = targets.shapes[parameter][0]
            turned = _said(version, experts, parameter in targets.kinds.transposed)
        stacks[stem] = Stack(parameter, key, turned)
    return stacks


def _parameters_of(
    file: LoraFile, module: str, entries: Mapping[str, Group], targets: Targets
) -> list[str]:
    """The parameters that the entries of one module are for, in their order; [] if they are for
    the module's weight, as usual.
    """
    wanted, name = file.configuration.parameters(module)
    if not wanted and len(entries) == 1 and targets.find(module):
        return []  # a layer with a weight, as nearly all are
    own = targets.parameters_of(module)
    chosen = [key for key in own if names_parameter(wanted, f"{name}.{key.rpartition('.')[2]}")]
    levels = [stem.count(_LEVEL, len(module)) for stem in entries]
    if chosen:
        if levels != list(range(len(chosen)))[::-1]:
            raise FormatError(
                f"{file.label}: its target_parameters {sorted(wanted)!r:.80} are {len(chosen)} "
                f"parameters of {module!r} ({', '.join(chosen)}), and it has factors for "
                f"{len(entries)} of them"
            )
        return chosen
    if wanted or not own:
        return []
    # Without a configuration, shapes have to tell.
    possible = [
        choice
        for choice in combinations(own, len(entries))
        if all(
            _could_be(group.parts, targets.shapes[parameter])
            for group, parameter in zip(entries.values(), choice, strict=True)
        )
    ]
    if len(possible) != 1 or levels != list(range(len(entries)))[::-1]:
        return []
    return list(possible[0])


def _sides(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """(out, in) of the factors."""
    return int(parts["up"].shape[0]), int(parts["down"].shape[-1])


def _could_be(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    if len(shape) == 2:
        return _sides(parts) == shape
    rank = int(parts["down"].shape[0])
    return len(shape) == 3 and rank % shape[0] == 0 and set(_sides(parts)) == set(shape[1:])


def _shown(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool | None:
    """Whether the factors are turned over, as far as their shapes show it."""
    if len(shape) != 3 or shape[1] == shape[2]:
        return None
    return {shape[1:]: False, shape[:0:-1]: True}.get(_sides(parts))


def _said(version: Any, experts: int, is_transposed: bool) -> bool | None:
    """Whether the factors of square matrices are turned over, by the version of PEFT that wrote
    them; None where that version and today's do not agree.
    """
    if experts == 1:  # which all versions treat as a layer
        return False
    numbers = re.findall(r"\d+", str(version or ""))[:3]
    wrote = tuple(map(int, numbers)) if len(numbers) == 3 else (0, 17, 0)  # which said no version
    if wrote < _FIRST_SWAP:
        then = True
    else:
        then = is_transposed if wrote >= _SECOND_SWAP else not is_transposed
    return then if then == is_transposed else None


def make_stack(stack: Stack, parts: Mapping[str, Tensor], scaling: Scaling, shapes: Shapes) -> Kind:
    """The patch of a parameter. FormatError where these are not factors for it."""
    if parts.keys() != {"up", "down"}:
        raise FormatError(f"a LoRA on the parameter {stack.parameter!r} is two factors, found "
                          f"{sorted(parts)}")  # fmt: skip
    up, down, shape = parts["up"], parts["down"], shapes[stack.parameter]
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise FormatError(
            f"factors of {tuple(up.shape)} and {tuple(down.shape)} do not make a product"
        )
    if len(shape) != 3:
        return LowRankKind(up, down, scaling.of(int(down.shape[0])))
    experts = shape[0]
    rank, rest = divmod(int(down.shape[0]), experts)
    if rest or rank == 0:
        raise FormatError(
            f"its factors have {down.shape[0]} rows for the {experts} experts of "
            f"{stack.parameter!r}; expected a multiple of {experts}"
        )
    if stack.turned is None and shape[1] == shape[2]:
        raise FormatError(
            f"{stack.parameter!r} has square matrices, and versions of PEFT read such factors in "
            "two ways; the file does not say which wrote it, or it is one that today's PEFT reads "
            "otherwise. Merge it with that version (merge_and_unload), and load the result"
        )
    ups = up.reshape(up.shape[0], rank, experts).permute(2, 0, 1)  # [experts, out, rank]
    downs = down.reshape(experts, rank, -1)  # [experts, rank, in]
    if stack.turned:
        ups, downs = downs.transpose(1, 2), ups.transpose(1, 2)
    return StackedKind(ups, downs, scaling.of(rank), height=int(ups.shape[1]))
