# SPDX-License-Identifier: Apache-2.0
"""Whether two runs gave the same: results, arguments afterwards, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

import distorch


class DifferentError(AssertionError):
    """Two runs that should be the same are not."""


def shardable(value: Any) -> bool:
    """Whether `distorch.shard` takes it: plain memory with at least one element."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and not value.is_quantized
        and value.numel() > 0
        and value.untyped_storage().nbytes() > 0
    )


def plain_copy(value: Any) -> Any:
    """A leaf like `value` with memory of its own; what is no tensor is given back."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def sharded_copy(value: torch.Tensor) -> torch.Tensor:
    """The same on a donor: RAM or disk, by its size."""
    copy = distorch.shard(value.detach().clone(), "cpu" if value.numel() % 2 else "disk")
    return copy.requires_grad_(value.requires_grad)


def copies(structure: Any, sharded: set[int]) -> Any:
    """The structure with copies of its tensors; those at these positions are sharded."""
    position = -1

    def copy(value: Any) -> Any:
        nonlocal position
        position += 1
        return sharded_copy(value) if position in sharded else plain_copy(value)

    return tree_map(copy, structure)


def outcome(function: Callable[[], Any]) -> Any:
    """What a call gives, with the same random numbers each time, or the error it raises."""
    torch.manual_seed(0)
    try:
        return function()
    except Exception as error:
        return error


def gradients(result: Any, inputs: Sequence[Any]) -> Any:
    """Gradients of the sum of all results for those inputs that want one, or the error."""
    outs = [
        t for t in tree_flatten(result)[0]
        if isinstance(t, torch.Tensor) and t.requires_grad and t.is_floating_point()
    ]  # fmt: skip
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if not outs or not wanted:
        return []
    try:
        return torch.autograd.grad([o.sum() for o in outs], wanted, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        return error


def assert_same(
    got: Any, wanted: Any, what: str, *, exact: bool = True, values: bool = True
) -> None:
    """Raises DifferentError unless both are equal bit for bit, or errors of one type.

    NaNs are equal. Without `exact`, within what torch.testing calls close; without `values`, only
    shapes, dtypes and strides are looked at.
    """
    if isinstance(wanted, Exception) or isinstance(got, Exception):
        if type(got) is not type(wanted):
            raise DifferentError(f"{what}: {describe(got)} instead of {describe(wanted)}")
        return
    ours, theirs = tree_flatten(got)[0], tree_flatten(wanted)[0]
    if len(ours) != len(theirs):
        raise DifferentError(f"{what}: {len(ours)} values instead of {len(theirs)}")
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            if not (a == b or (a != a and b != b)):  # noqa: PLR0124
                raise DifferentError(f"{what}: {a!r} instead of {b!r}")
        else:
            _assert_same_geometry(a, b, what)
            if values:
                _assert_same_values(a, b, what, exact)


def _assert_same_geometry(a: Any, b: torch.Tensor, what: str) -> None:
    geometry = [(t.shape, t.dtype, t.layout, t.device) for t in (a, b)]
    if geometry[0] != geometry[1]:
        raise DifferentError(f"{what}: {geometry[0]} instead of {geometry[1]}")
    strided = a.layout is torch.strided and not a.is_nested
    if strided and a.numel() > 1 and not distorch.is_sharded(a) and a.stride() != b.stride():
        raise DifferentError(f"{what}: strides {a.stride()} instead of {b.stride()}")


def _assert_same_values(a: torch.Tensor, b: torch.Tensor, what: str, exact: bool) -> None:
    values = a.detach().clone() if distorch.is_sharded(a) else a.detach()
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    try:
        torch.testing.assert_close(values, b.detach(), equal_nan=True, **tolerance)
    except AssertionError as error:
        raise DifferentError(f"{what}: {error}") from None


def describe(value: Any) -> str:
    """An error's type and first line; of anything else, that there is a value."""
    if not isinstance(value, Exception):
        return "a value"
    return f"{type(value).__name__} ({str(value).splitlines()[0] if str(value) else ''})"
