# SPDX-License-Identifier: Apache-2.0
"""The weights of a module, grouped by the bytes they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distorch import _ops
from distorch.errors import PlacementError
from distorch.planner import Inventory, WeightInfo


@dataclass
class Member:
    """One name of one parameter object."""

    name: str
    owner: nn.Module
    key: str
    parameter: nn.Parameter


@dataclass
class Group:
    """Parameters whose bytes overlap (tied weights): they move together.

    `begin` and `end` are bytes within the storage; `members` are all names, the first one first.
    """

    begin: int
    end: int
    members: list[Member] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def first(self) -> nn.Parameter:
        return self.members[0].parameter

    def info(self) -> WeightInfo:
        """The group as the planner sees it."""
        p = self.first
        return WeightInfo(
            name=self.name,
            nbytes=self.nbytes,
            shape=shape_of(p),
            dtype=str(p.dtype).removeprefix("torch."),
            kind="parameter",
            floating=can_leave_device(p)
            and (p.is_floating_point() or p.is_complex() or p.dtype in _QUANTISED),
            aliases=tuple(member.name for member in self.members[1:]),
        )


@dataclass
class Buffer:
    """One buffer, under every name, at every (module, key) that has it."""

    tensor: torch.Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def persistent(self) -> bool:
        """Whether a state dict has it under any of its names."""
        return any(key not in owner._non_persistent_buffers_set for owner, key in self.places)

    def put(self, tensor: torch.Tensor) -> None:
        """Gives every place another tensor."""
        for owner, key in self.places:
            owner._buffers[key] = tensor


_QUANTISED = frozenset({torch.int8, torch.uint8})


def has_bytes(tensor: torch.Tensor) -> bool:
    """Whether the tensor is plain memory: a view of one storage, and nothing else but its dtype.

    Sparse, nested and quantised tensors and wrapper subclasses are not.
    """
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    return not is_traceable_wrapper_subclass(tensor)


def can_leave_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes can be on a donor: plain memory, or a wrapper around such."""
    if not is_traceable_wrapper_subclass(tensor):
        return has_bytes(tensor)
    names, _ = tensor.__tensor_flatten__()
    return all(can_leave_device(getattr(tensor, name)) for name in names)


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors that hold what a tensor says: itself, or indices and values."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(tensor, name))]
    if has_bytes(tensor) or tensor.is_quantized:
        return [tensor]
    if tensor.is_nested:
        return [tensor.detach().values()] if tensor.layout is torch.strided else []
    if tensor.layout is torch.sparse_coo:
        return [tensor.detach()._indices(), tensor.detach()._values()]
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    index = (
        (tensor.crow_indices(), tensor.col_indices())
        if rows
        else (tensor.ccol_indices(), tensor.row_indices())
    )
    return [*index, tensor.detach().values()]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements (and indices, if it is sparse)."""
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its shape; of a nested tensor, which has none, the number of elements."""
    return (tensor.numel(),) if tensor.is_nested else tuple(tensor.shape)


def form_of(weight: torch.Tensor) -> str:
    """Dtype and shape, such as "float32 [4, 4]"."""
    return f"{str(weight.dtype).removeprefix('torch.')} {list(shape_of(weight))}"


def byte_extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes [begin, end) of its storage that a tensor can reach; decoded: on its donor."""
    if _ops.is_sharded(tensor) and (state := _ops.state(tensor)).decoded:
        return 0, state.nbytes
    if not has_bytes(tensor):
        return 0, size_of(tensor)
    item, begin = tensor.element_size(), int(tensor.storage_offset())
    if tensor.numel() == 0:
        return begin * item, begin * item
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = begin + sum((size - 1) * stride for size, stride in steps)
    return begin * item, (last + 1) * item


def named_members(module: nn.Module) -> Iterator[Member]:
    """Every name of every parameter, tied ones under each of their names, in definition order."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield Member(f"{prefix}.{key}" if prefix else key, owner, key, parameter)


def _refuse_unready(module: nn.Module) -> None:
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise PlacementError(
                f"weight {name!r} of a lazy module has no shape yet: run the model once on an "
                "example input, then distribute it"
            )
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise PlacementError(
                f"{name or type(module).__name__!r} is a TorchScript module, which takes no hooks: "
                "distribute the nn.Module it was made from (torch.jit.trace works on that)"
            )


def group_members(module: nn.Module) -> list[Group]:
    """The module's parameters as groups of overlapping bytes, in definition order.

    Raises PlacementError on a module whose weights have no shape yet, and on a compiled one.
    """
    _refuse_unready(module)
    by_storage: dict[object, list[tuple[int, int, Member]]] = {}
    for position, member in enumerate(named_members(module)):
        tensor = member.parameter
        begin, end = byte_extent(tensor)
        by_storage.setdefault(_storage_key(tensor, position), []).append((begin, end, member))
    groups = [group for entries in by_storage.values() for group in _merge(entries)]
    positions = {name: i for i, name in enumerate(m.name for m in named_members(module))}
    groups.sort(key=lambda group: positions[group.name])
    return groups


def _storage_key(tensor: torch.Tensor, position: int) -> object:
    if _ops.is_sharded(tensor):
        return ("sharded", _ops.state(tensor).id)
    if not has_bytes(tensor):
        return ("whole", id(tensor))
    if tensor.numel() == 0:
        return ("empty", position)
    return ("plain", tensor.untyped_storage()._cdata)


def _merge(entries: list[tuple[int, int, Member]]) -> list[Group]:
    """Overlapping extents become one group; a storage cut into disjoint ones gives several."""
    groups: list[Group] = []
    for begin, end, member in entries:
        touching = [g for g in groups if begin < g.end and g.begin < end]
        merged = Group(begin, end, [member])
        if touching:
            merged = Group(
                min(begin, *(g.begin for g in touching)),
                max(end, *(g.end for g in touching)),
                [m for g in touching for m in g.members] + [member],
            )
        at = groups.index(touching[0]) if touching else len(groups)
        groups = [g for g in groups if g not in touching]
        groups.insert(at, merged)
    return groups


def unique_buffers(module: nn.Module) -> list[Buffer]:
    """The module's buffers in definition order, each tensor once."""
    found: dict[int, Buffer] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, tensor in owner._buffers.items():
            if tensor is not None:
                buffer = found.setdefault(id(tensor), Buffer(tensor))
                buffer.names.append(f"{prefix}.{key}" if prefix else key)
                buffer.places.append((owner, key))
    return list(found.values())


def buffer_infos(module: nn.Module) -> list[WeightInfo]:
    """The module's buffers as the planner sees them."""
    return [
        WeightInfo(
            name=buffer.name,
            nbytes=size_of(buffer.tensor),
            shape=shape_of(buffer.tensor),
            dtype=str(buffer.tensor.dtype).removeprefix("torch."),
            kind="buffer",
            floating=buffer.tensor.is_floating_point(),
        )
        for buffer in unique_buffers(module)
    ]


def inventory_of(module: nn.Module, groups: list[Group]) -> Inventory:
    """What the planner needs to know of a module."""
    return Inventory((*(group.info() for group in groups), *buffer_infos(module)))
