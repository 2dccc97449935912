# SPDX-License-Identifier: Apache-2.0
"""Moves one group of weights to where the plan wants it, without touching the module yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from distorch import _donors, _ops
from distorch._behaviour import geometry_over
from distorch.errors import DistorchError, PlacementError
from distorch.machine import machine
from distorch.planner import Plan
from distorch.runtime import wrapped
from distorch.runtime.groups import (
    Group,
    byte_extent,
    can_leave_device,
    has_bytes,
    parts_of,
)

_COMPARE_BYTES = 32 << 20
_SMALL_BYTES = 512 << 10  # weights up to this size are packed
_PIECE_BYTES = 4 << 20
_PACK_ALIGN = 512  # as slots in the ring are


@dataclass
class Origin:
    """Where a weight came from: a range of a checkpoint, and its present values or not."""

    path: str
    offset: int
    nbytes: int


def current_place(tensor: torch.Tensor) -> str:
    """The device or tier that holds a tensor's bytes: "cpu", "cuda:0", "disk"."""
    if _ops.is_sharded(tensor):
        return _ops.state(tensor).tier
    if wrapped.is_wrapper(tensor):
        parts = parts_of(tensor)
        return current_place(max(parts, key=lambda part: part.numel() * part.element_size()))
    device = tensor.device
    if device.type != "cpu" and device.index is None:
        return f"{device.type}:0"
    return str(device)


def planned_place(group: Group, plan: Plan) -> str:
    """Where the plan has a group. A group that came or was renamed since is where it is."""
    return plan.placement.get(group.name) or current_place(group.first)


def group_bytes(group: Group) -> torch.Tensor:
    """The group's bytes, uint8 [nbytes], plain, on the device that holds them.

    A view of a plain tensor's storage, new memory for a sharded one.
    """
    tensor = group.first.detach()
    if _ops.is_sharded(tensor):
        data = _ops.host_tensor((group.nbytes,), torch.uint8)
        _ops.read_donor(tensor, group.begin, data)
        return data
    return _ops.byte_view(tensor, group.begin, group.nbytes)


def alone(data: torch.Tensor) -> torch.Tensor:
    """The same bytes as the whole of a storage, so that a donor keeps no more than these."""
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()


def same_bytes(origin: Origin, data: torch.Tensor) -> bool:
    """Whether `data` (uint8, CPU) is what the checkpoint holds at that range."""
    if origin.nbytes != data.numel():
        return False
    buffer = torch.empty(min(_COMPARE_BYTES, max(data.numel(), 1)), dtype=torch.uint8)
    for begin in range(0, data.numel(), _COMPARE_BYTES):
        part = data[begin : begin + _COMPARE_BYTES]
        into = buffer[: part.numel()]
        try:
            _ops.read_file(origin.path, origin.offset + begin, into)
        except DistorchError:  # the checkpoint is gone or cut short since
            return False
        if not torch.equal(into, part):
            return False
    return True


def _from_checkpoint(group: Group, origin: Origin, compute: torch.device) -> torch.Tensor:
    """The group read from its checkpoint again: uint8 [nbytes], sharded."""
    dtypes = {member.parameter.dtype for member in group.members}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
    count = group.nbytes // dtype.itemsize
    path, offset = origin.path, origin.offset
    sharded = _ops.shard_file(path, offset, (count,), dtype, compute=compute, name=group.name)
    return sharded.view(torch.uint8)


def _whole(group: Group, target: str, compute: torch.device) -> torch.Tensor:
    if target == str(compute) and not wrapped.is_on_donor(group.first):
        return group.first.detach().to(compute)
    if can_leave_device(group.first):
        return _stage_parts(group, target, compute)
    raise PlacementError(
        f"weight {group.name!r} should go to {target!r}, but a sparse, nested or quantised "
        f"tensor is not plain memory: it stays on the compute device ({compute}); take it out of "
        "the rules"
    )


def _stage_parts(group: Group, target: str, compute: torch.device) -> torch.Tensor:
    """See Note [Wrappers]."""
    member = group.members[0]

    def staged(name: str, part: torch.Tensor) -> torch.Tensor:
        if wrapped.stays(part):
            return part.detach().to(compute)
        alone = replace(member, name=f"{group.name}.{name}", parameter=cast(nn.Parameter, part))
        whole = Group(*byte_extent(part), [alone])
        return member_tensor(stage(whole, target, compute), whole, part)

    return wrapped.rebuilt(group.first, staged)


def packed_places(groups: Sequence[Group], compute: torch.device) -> dict[int, tuple[int, int]]:
    """id(group) -> (piece, begin in bytes) of the groups that a `Packing` of these packs."""
    return _pack(groups, compute)[0]


def _pack(
    groups: Sequence[Group], compute: torch.device
) -> tuple[dict[int, tuple[int, int]], list[int]]:
    """The same, and the bytes of each piece."""
    places: dict[int, tuple[int, int]] = {}
    sizes: list[int] = []
    for group in groups:
        if compute.type == "cpu" or not has_bytes(group.first) or group.nbytes > _SMALL_BYTES:
            continue
        room = -(-group.nbytes // _PACK_ALIGN) * _PACK_ALIGN
        if not sizes or sizes[-1] + room > _PIECE_BYTES:
            sizes.append(0)
        places[id(group)] = len(sizes) - 1, sizes[-1]
        sizes[-1] += room
    return places, sizes


class Packing:
    """Small weights that follow each other share a piece of pinned memory.

    Copies of neighbours then become one. Pieces stay small, so that a weight which moves on does
    not keep much of others' memory.
    """

    def __init__(self, groups: Sequence[Group], compute: torch.device) -> None:
        self._compute = compute
        self._places, self._sizes = _pack(groups, compute)
        self._pieces: dict[int, torch.Tensor] = {}

    def shard(self, group: Group, data: torch.Tensor) -> torch.Tensor | None:
        """The group's bytes in their place of a piece, or None when it has none."""
        if id(group) not in self._places:
            return None
        piece, begin = self._places[id(group)]
        if piece not in self._pieces:
            self._pieces[piece] = _ops.pinned_memory(self._sizes[piece], self._compute)
        return _donors.shard_within(self._pieces[piece], begin, data, self._compute, group.name)


def stage(
    group: Group,
    target: str,
    compute: torch.device,
    origin: Origin | None = None,
    packing: Packing | None = None,
) -> torch.Tensor:
    """The group's bytes at `target` ("cpu", "disk" or a device): uint8 [nbytes].

    A tensor that is not plain memory is given back as it is, a wrapper around staged parts (see
    Note [Wrappers]), others on the compute device.
    Sharded when `target` is a donor, plain when it is the compute device. A weight that fetches
    decode keeps the form that it has on a donor, on the compute device, too. The module is not
    changed. Raises PlacementError, FetchError.
    """
    if _ops.is_sharded(group.first) and _ops.state(group.first).decoded:
        return _stage_stored(group, target, compute, origin)
    if not has_bytes(group.first):
        return _whole(group, target, compute)
    if machine.needs_values(compute):
        data = group_bytes(group)
    else:
        data = torch.empty(group.nbytes, dtype=torch.uint8, device="meta")
    if target == str(compute):
        return _donors.moved(data, compute)
    if target == "disk" and origin is not None and same_bytes(origin, data.cpu()):
        return _from_checkpoint(group, origin, compute)
    if target in ("cpu", "disk") and not data.is_meta:
        data = data.cpu()
    packed = packing.shard(group, data) if packing is not None and target == "cpu" else None
    return (
        packed if packed is not None else _donors.shard_on(target, alone(data), compute, group.name)
    )


def in_place(data: torch.Tensor, compute: torch.device, name: str) -> torch.Tensor:
    """The same bytes (uint8, on the compute device) as a sharded tensor over their own memory."""
    return _donors.shard_on(str(compute), alone(data), compute, name)


def _stage_stored(
    group: Group, target: str, compute: torch.device, origin: Origin | None
) -> torch.Tensor:
    """A decoded weight's stored bytes at `target`; uint8 over what they are decoded to."""
    first = group.first.detach()
    if first.device != compute:
        raise PlacementError(
            f"weight {group.name!r} is decoded on {first.device}: distorch.undistribute(model) "
            f"first, then distribute it for {compute}"
        )
    data = group_bytes(group)
    if target == "disk" and origin is not None and same_bytes(origin, data):
        stored = _from_checkpoint(group, origin, compute)
    else:
        stored = _donors.shard_on(target, data, compute, group.name)
    decoded = _ops.decoded_like(stored, first)
    count = decoded.untyped_storage().nbytes() // decoded.element_size()
    return decoded.as_strided((count,), (1,), 0).view(torch.uint8)


def plain_values(group: Group, device: torch.device) -> torch.Tensor:
    """The values of a group of decoded weights in plain memory: uint8 [bytes]."""
    first = group.first.detach()
    count = first.untyped_storage().nbytes() // first.element_size()
    return _ops.byte_view(first.as_strided((count,), (1,), 0).clone().to(device))


def member_tensor(staged: torch.Tensor, group: Group, parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's dtype and geometry over the staged bytes of its group."""
    if not has_bytes(parameter):
        return staged
    if _ops.is_sharded(parameter) and _ops.state(parameter).decoded:
        return geometry_over(staged, parameter, int(parameter.storage_offset()))
    shifted = int(parameter.storage_offset()) - group.begin // parameter.element_size()
    return geometry_over(staged, parameter, shifted)
