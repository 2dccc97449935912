# SPDX-License-Identifier: Apache-2.0
"""Sharded tensors one at a time: make them, recognise them, make them real."""

from __future__ import annotations

from typing import Any

import torch

from distorch import _donors, _native, _ops
from distorch._behaviour import attach_behaviour
from distorch.errors import PlacementError, SpecError
from distorch.runtime.groups import has_bytes
from distorch.runtime.options import compute_device


def is_sharded(tensor: object) -> bool:
    """Whether this is a tensor whose bytes live on a donor. False for everything else."""
    return isinstance(tensor, torch.Tensor) and _ops.is_sharded(tensor)


def shard(
    tensor: torch.Tensor, donor: str = "cpu", compute: str | torch.device | None = None
) -> torch.Tensor:
    """A sharded copy of a tensor: the same shape, dtype and values, with its bytes on a donor.

    The result is always sharded, also where donor and compute device are the same: a fetch may then
    be the donor's memory itself. Strides are kept if the tensor is dense; one that overlaps or has
    gaps becomes contiguous.

    Args:
        tensor: A plain tensor. An `nn.Parameter` gives an `nn.Parameter`.
        donor: "cpu", "disk", a device ("cuda:1"), or several joined by "+" ("cpu+cuda:1"): the
            bytes are then striped over them, and fetched over their links at once.
        compute: Where operators on it run. If not given: the tensor's device.

    Returns:
        The sharded tensor or parameter.

    Raises:
        SpecError: An argument is wrong.
        PlacementError: The donor has no room or is not there, or the tensor has no plain memory.
    """
    _check_tensor(tensor)
    if not has_bytes(tensor):
        raise PlacementError(
            f"cannot shard a {type(tensor).__name__} with layout {tensor.layout}: expected plain "
            "memory, not a sparse, nested or quantised tensor or a wrapper; shard its parts"
        )
    if is_sharded(tensor):
        tensor = materialize(tensor)
    if tensor.is_meta:
        raise PlacementError("cannot shard a tensor on the meta device: it has no values")
    device = torch.device(compute_device(tensor.device if compute is None else compute))
    name = str(donor).strip().lower()
    with torch.no_grad():
        values = tensor.detach().clone(memory_format=torch.preserve_format)
        values = values.resolve_conj().resolve_neg()
        sharded = _donors.shard_on(name, values, device, "tensor")
    if isinstance(tensor, torch.nn.Parameter):
        parameter = torch.nn.Parameter(sharded, requires_grad=tensor.requires_grad)
        attach_behaviour(parameter, stand_in=sharded)
        return parameter
    attach_behaviour(sharded, stand_in=sharded.detach())
    return sharded.requires_grad_(tensor.requires_grad)


def materialize(tensor: torch.Tensor) -> torch.Tensor:
    """A real copy of a tensor on its compute device, detached from autograd. Strides are kept.

    Raises:
        SpecError: It is no tensor.
        FetchError: Its bytes could not be brought.
    """
    _check_tensor(tensor)
    with torch.no_grad():
        return tensor.detach().clone(memory_format=torch.preserve_format)


def _check_tensor(tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise SpecError(f"expected a tensor, got {type(tensor).__name__}")


def fetch_count() -> int:
    """How often, in this process, a sharded weight was made real for an operator."""
    return int(_native.fetch_count())


class _ShardedMeta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.nn.Parameter) and is_sharded(instance)


class ShardedParameter(metaclass=_ShardedMeta):
    """`isinstance(p, ShardedParameter)`: a parameter whose bytes live on a donor.

    A virtual class: `type(p)` stays `torch.nn.Parameter`, so that code which looks at types
    (torch.compile, PEFT, optimizers) sees an ordinary parameter. Not to be instantiated.
    """

    def __init__(self) -> None:
        raise TypeError("ShardedParameter only answers isinstance(); use distorch.shard(tensor)")
