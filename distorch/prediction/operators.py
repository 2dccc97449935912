# SPDX-License-Identifier: Apache-2.0
"""Operators of a step, as those see them who note them: which weights each uses, and which ones are
no work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distorch import _ops
from distorch.runtime.groups import byte_extent, group_members, has_bytes, parts_of
from distorch.step import Use

LOOKUPS = frozenset({"aten::embedding"})
# The hook fetches the weights of these from the last argument to the first: in this order GCC
# evaluates the arguments of a call (csrc/hook/typed.cpp). Of all others, the first comes first.
LAST_FIRST = frozenset({
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::linear",
    "aten::native_layer_norm", "aten::_scaled_mm",
})  # fmt: skip
# They give memory or an answer, and give a device nothing to do. Nor do views.
NO_WORK = frozenset({
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided", "aten::is_pinned", "aten::_unsafe_view", "aten::lift_fresh",
})  # fmt: skip


class Names:
    """The weights of a module, by their bytes in storages."""

    def __init__(self, module: nn.Module) -> None:
        self._known: dict[int, list[tuple[int, float, str]]] = {}  # begin, end, first name
        for group in group_members(module):
            whole = group.first
            alone = not has_bytes(whole) or (_ops.is_sharded(whole) and _ops.state(whole).decoded)
            begin, end = (0, math.inf) if alone else (group.begin, group.end)
            for part in parts_of(whole):
                if has_bytes(part):
                    self._known.setdefault(_storage(part), []).append((begin, end, group.name))

    def of(self, tensor: torch.Tensor) -> Iterator[str]:
        """The weights whose bytes a tensor shows; none for one that is no plain memory."""
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                yield from self.of(getattr(tensor, name))
        elif has_bytes(tensor) and (known := self._known.get(_storage(tensor))):
            if len(known) == 1:
                yield known[0][2]
                return
            first, last = byte_extent(tensor)
            yield from (name for begin, end, name in known if begin < last and first < end)

    def also(self, tensor: torch.Tensor, original: torch.Tensor) -> None:
        """Another tensor that stands for what `original` shows."""
        found = [(0, math.inf, name) for name in self.of(original)]
        if found:
            self._known[_storage(tensor)] = found


def _storage(tensor: torch.Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)


def is_no_work(func: Any) -> bool:
    """Whether it gives a device nothing to do: views, memory without values, answers."""
    return isinstance(func, OpOverload) and (func.is_view or func._schema.name in NO_WORK)


def use_of(names: Names, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Use:
    """One operator, without its time: the weights in the order in which they are fetched."""
    known = isinstance(func, OpOverload)
    given = list(tensors_in((*args, *kwargs.values())))
    if known and func._schema.name in LAST_FIRST:
        given.reverse()
    weights = tuple(dict.fromkeys(name for tensor in given for name in names.of(tensor)))
    rows = args[1].numel() if known and func._schema.name in LOOKUPS and weights else 0
    return Use(0.0, 1, weights, rows)


def append(uses: list[Use], use: Use) -> None:
    """Puts a use behind the others. A run of operators on no weight becomes one use."""
    if uses and _are_one(uses[-1], use):
        use = _joined(uses.pop(), use)
    uses.append(use)


def _are_one(first: Use, then: Use) -> bool:
    """Whether both are operators on no weight, in a run of such."""
    plain = not (first.weights or then.weights or first.copied or then.copied)
    return plain and not first.host_waits


def _joined(first: Use, then: Use) -> Use:
    return then._replace(
        seconds=first.seconds + then.seconds,
        operators=first.operators + then.operators,
        idle=first.idle + then.idle,
    )


def needs_values(func: OpOverload) -> bool:
    """Whether the host has to know numbers that a device computes, before it can go on."""
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors among arguments, also those in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
