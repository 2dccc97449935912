# SPDX-License-Identifier: Apache-2.0
"""Parameters and buffers that get other memory, and how they get the old one back.

Every step puts its reverse on an `ExitStack` before it is taken. An error or an interrupt unwinds
the stack, in reverse order. After success, `pop_all()` empties it.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from distorch import _ops
from distorch._behaviour import replace_data
from distorch.machine import machine
from distorch.runtime import wrapped
from distorch.runtime.groups import Group, unique_buffers
from distorch.runtime.staging import current_place, member_tensor


def swap_in(
    module: nn.Module,
    groups: list[Group],
    staged: dict[int, torch.Tensor],
    buffers: dict[str, torch.Tensor],
    undo: ExitStack,
) -> None:
    """Gives the module what was staged; how to go back is noted first, step by step.

    Waits for devices whose memory the module gets, and then for those whose memory it lets go of.
    """
    machine.synchronize_all(str(t.device) for t in staged.values() if not _ops.is_sharded(t))
    let_go = [current_place(groups[i].first) for i in staged if not groups[i].first.is_meta]
    for index, tensor in staged.items():
        group = groups[index]
        parameters = {id(member.parameter): member.parameter for member in group.members}
        values = {i: member_tensor(tensor, group, p) for i, p in parameters.items()}
        for identity, parameter in parameters.items():
            if parameter.is_inference() or wrapped.is_wrapper(parameter):
                _replace_parameter(group, parameter, values[identity], undo)
                continue
            _give(parameter, values[identity], undo)
    for buffer in unique_buffers(module):
        if buffer.name in buffers:
            undo.callback(buffer.put, buffer.tensor)
            buffer.put(buffers[buffer.name])
    machine.synchronize_all(let_go)


def _give(parameter: nn.Parameter, value: torch.Tensor, undo: ExitStack) -> None:
    """The same bits from another place."""
    if _can_adopt(parameter, value):
        undo.callback(_adopt, parameter, _ops.share(parameter.detach()))
        _adopt(parameter, value)
    else:
        undo.callback(replace_data, parameter, parameter.data)
        replace_data(parameter, value)


def _adopt(parameter: nn.Parameter, value: torch.Tensor) -> None:
    while not _ops.adopt(parameter, value, _ops.moves(parameter)):
        pass  # another thread moved it between the two calls


def _can_adopt(parameter: nn.Parameter, value: torch.Tensor) -> bool:
    """Whether only the place differs, so that the tensor itself need not change."""
    return (
        _ops.is_sharded(parameter)
        and _ops.is_sharded(value)
        and parameter.device == value.device
        and parameter.dtype == value.dtype
        and parameter.shape == value.shape
        and parameter.stride() == value.stride()
        and parameter.storage_offset() == value.storage_offset()
        and parameter.untyped_storage().nbytes() == value.untyped_storage().nbytes()
    )


def _replace_parameter(
    group: Group, parameter: nn.Parameter, value: torch.Tensor, undo: ExitStack
) -> None:
    """A new object for a parameter that cannot get other data: one that was made in inference mode
    has no version counter, which the new data's dispatch would ask for; a wrapper's parts are
    attributes of the object.
    """
    if wrapped.is_wrapper(value):
        fresh = wrapped.as_parameter(value, parameter.requires_grad)
    else:
        fresh = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
        replace_data(fresh, value)
    for member in group.members:
        if member.parameter is parameter:
            undo.callback(member.owner._parameters.__setitem__, member.key, parameter)
            member.owner._parameters[member.key] = fresh
            member.parameter = fresh
