# SPDX-License-Identifier: Apache-2.0
"""Weights that are several tensors in one: wrapper subclasses, such as quantised weights.

Note [Wrappers]
A wrapper subclass (a quantised weight of torchao, say) takes operators in Python and calls others
on its parts. So its parts are sharded one by one, and the wrapper around them stays what it is: it
is flattened and put together again, the way torch.compile does it. A part of one element, such as a
scale, stays on the compute device; plans and reports count it with the others.

A class may copy parts when it is detached (comfy-kitchen's does), and a copy of a sharded part is
real memory on the compute device. So parameters are made here without `nn.Parameter(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distorch import _ops
from distorch._behaviour import attach_behaviour, saved_values

Change = Callable[[str, torch.Tensor], torch.Tensor]


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of others that it can be taken apart into."""
    return is_traceable_wrapper_subclass(tensor)


def _named_parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    wrapper: Any = tensor
    names, _ = wrapper.__tensor_flatten__()
    return {name: getattr(wrapper, name) for name in names}


def stays(part: torch.Tensor) -> bool:
    """Whether a part is too small to leave the compute device."""
    return part.numel() <= 1


def sharded_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The sharded tensors that a weight is made of: itself, parts of a wrapper, or none."""
    if _ops.is_sharded(tensor):
        return [tensor]
    if not is_wrapper(tensor):
        return []
    return [found for part in _named_parts(tensor).values() for found in sharded_parts(part)]


def is_on_donor(tensor: torch.Tensor) -> bool:
    """Whether operators on this tensor fetch bytes from a donor."""
    return _ops.is_sharded(tensor) or (is_wrapper(tensor) and bool(sharded_parts(tensor)))


def rebuilt(tensor: torch.Tensor, change: Change, name: str = "") -> torch.Tensor:
    """The wrapper around `change(name, part)` of each of its parts."""
    if not is_wrapper(tensor):
        return change(name, tensor)
    wrapper: Any = tensor
    _, context = wrapper.__tensor_flatten__()
    parts = {
        key: rebuilt(part, change, f"{name}.{key}".removeprefix("."))
        for key, part in _named_parts(tensor).items()
    }
    made: torch.Tensor = type(wrapper).__tensor_unflatten__(
        parts, context, tensor.shape, tensor.stride()
    )
    return made


def as_parameter(tensor: torch.Tensor, requires_grad: bool = False) -> nn.Parameter:
    """A parameter that is a wrapper around the parts of this one; see Note [Wrappers].

    Sharded parts get what they do differently: copying, saving.
    """
    made: Any = rebuilt(tensor, lambda _, part: part)
    made.requires_grad_(requires_grad)
    made._is_param = True  # what nn.Parameter sets on an instance of another class
    for part in sharded_parts(made):
        attach_behaviour(part)
    return cast(nn.Parameter, made)


def saved(tensor: torch.Tensor) -> torch.Tensor:
    """A wrapper for a state dict: its parts over their donors' bytes, nothing read yet."""
    return rebuilt(
        tensor, lambda _, part: saved_values(part) if _ops.is_sharded(part) else part.cpu()
    )
