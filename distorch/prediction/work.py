# SPDX-License-Identifier: Apache-2.0
"""What an operator has to do, from the shapes of its arguments: arithmetic and bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

# They read as much of their first argument as they give.
_PICKS = frozenset({
    "aten::embedding", "aten::index", "aten::index_select", "aten::gather", "aten::take",
    "aten::take_along_dim", "aten::_embedding_bag", "aten::embedding_bag",
})  # fmt: skip
# They write to places of their first argument, and read the others.
_PUTS = frozenset({
    "aten::index_put_", "aten::_index_put_impl_", "aten::index_copy_", "aten::index_add_",
    "aten::index_fill_", "aten::scatter_", "aten::scatter_add_", "aten::scatter_reduce_",
})  # fmt: skip
# They do not read what they write to.
_OVERWRITES = frozenset({
    "aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_",
    "aten::bernoulli_", "aten::exponential_",
})  # fmt: skip


def all_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Those among arguments, in lists and dicts, too."""
    return [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]


def written_by(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """The tensors that an operator writes to."""
    if not func._schema.is_mutable:
        return []
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            written += all_tensors((given,), {})
    return written


def flops_of(func: OpOverload, args: tuple[Any, ...]) -> float:
    """Of products that PyTorch's table does not have."""
    if func._schema.name == "aten::addbmm":
        batch, rows, inner = args[1].shape
        return float(2 * batch * rows * inner * args[2].shape[2])
    if func._schema.name == "aten::_int_mm":
        return float(2 * args[0].numel() * args[1].shape[1])
    if func._schema.name == "aten::_trilinear":  # torch.nn.Bilinear
        first, weight, second = args[:3]
        numbers = first.shape[0] * weight.numel() + second.numel() * weight.shape[1]
        return float(2 * numbers)
    return 0.0


def bytes_of(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> tuple[int, bool]:
    """What an operator reads and writes, and whether its numbers have 16 bits or fewer."""
    given = all_tensors(args, kwargs)
    made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
    name, half = func._schema.name, bool(given) and is_half(given[0])
    if name in _PICKS:
        return 2 * bytes_in(made[:1]), half
    if name in _PUTS:  # what is put there is read and written, and so is the place
        return 2 * bytes_in(given[1:]), half
    if name in _OVERWRITES:
        return bytes_in(given), half
    if name.endswith("_like"):
        return bytes_in(made), half
    return bytes_in(given) + bytes_in(made or written_by(func, args, kwargs)), half


def bytes_in(tensors: list[torch.Tensor]) -> int:
    """Without what is only repeated, as by `expand`."""
    return sum(
        min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) if t.is_meta else t.nbytes
        for t in tensors
    )


def is_half(tensor: torch.Tensor) -> bool:
    """Whether its numbers have 16 bits or fewer."""
    return tensor.itemsize <= 2
