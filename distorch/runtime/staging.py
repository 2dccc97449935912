"""Moves one group of weights to where the plan wants it, without touching the module yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distorch import _ops
from distorch._behaviour import geometry_over
from distorch.errors import DistorchError, PlacementError
from distorch.runtime import machine
from distorch.runtime.groups import Group, has_bytes

_COMPARE_BYTES = 32 << 20


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
    device = tensor.device
    if device.type != "cpu" and device.index is None:
        return f"{device.type}:0"
    return str(device)


def group_bytes(group: Group) -> torch.Tensor:
    """The group's bytes, uint8 [nbytes], plain, on the device that holds them.

    A view of a plain tensor's storage, new memory for a sharded one.
    """
    tensor = group.first.detach()
    if _ops.is_sharded(tensor):
        data = torch.empty(group.nbytes, dtype=torch.uint8)
        _ops.read_donor(tensor, group.begin, data)
        return data
    return _ops.byte_view(tensor, group.begin, group.nbytes)


def _alone(data: torch.Tensor) -> torch.Tensor:
    """The same bytes as the whole of a storage, so that a donor keeps no more than these."""
    return data if data.untyped_storage().nbytes() == data.numel() else data.clone()


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
    if target == str(compute):
        return group.first.detach().to(compute)
    raise PlacementError(
        f"weight {group.name!r} should go to {target!r}, but a sparse, nested or quantised "
        f"tensor is not plain memory: it stays on the compute device ({compute}); take it out of "
        "the rules"
    )


def stage(
    group: Group, target: str, compute: torch.device, origin: Origin | None = None
) -> torch.Tensor:
    """The group's bytes at `target` ("cpu", "disk" or a device): uint8 [nbytes].

    A tensor that is not plain memory is given back as it is, on the compute device.
    Sharded when `target` is a donor, plain when it is the compute device. The module is not
    changed. Raises PlacementError, FetchError.
    """
    if not has_bytes(group.first):
        return _whole(group, target, compute)
    if machine.needs_values(compute):
        data = group_bytes(group)
    else:
        data = torch.empty(group.nbytes, dtype=torch.uint8, device="meta")
    if target == str(compute):
        return _ops.moved(data, compute)
    if target == "disk" and origin is not None and same_bytes(origin, data.cpu()):
        return _from_checkpoint(group, origin, compute)
    if target in ("cpu", "disk") and not data.is_meta:
        data = data.cpu()
    return _ops.shard_on(target, _alone(data), compute, group.name)


def member_tensor(staged: torch.Tensor, group: Group, parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's dtype and geometry over the staged bytes of its group."""
    if not has_bytes(parameter):
        return staged
    shifted = int(parameter.storage_offset()) - group.begin // parameter.element_size()
    return geometry_over(staged, parameter, shifted)
