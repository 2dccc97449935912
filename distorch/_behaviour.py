# SPDX-License-Identifier: Apache-2.0
"""What a sharded parameter answers where Python or C code would read its memory.

Note [Behaviour on the instance]
copy, pickle, numpy and printing look at the object before its class, so what a sharded parameter
must do differently is set on the instance: no class of torch is patched, and `type(p)` stays
`nn.Parameter`. Every function here holds the parameter weakly: a cycle would keep donor memory
until the garbage collector runs.
"""

from __future__ import annotations

import copy
import copyreg
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distorch import _donors, _ops
from distorch.errors import PlacementError

# These libraries ask for addresses only to see whether two weights share memory. They get a number
# that is the same for the same weight, and is no address. Everybody else gets an error: a kernel
# that is given the number would read from nowhere.
_COMPARE_ADDRESSES = ("peft.", "accelerate.hooks", "accelerate.utils.modeling")

# (weight id, how often the weight has moved) -> the tensor that state_dict gave out for it, so that
# tied weights stay tied, and its version then. Once somebody wrote to that tensor, it is theirs and
# says nothing of the weight.
_given_out: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], int]] = {}


def alias_of_donor(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor with the sharded tensor's values, over the donor's own bytes where possible.

    Host memory is aliased, files are mapped copy-on-write: nothing is read before it is touched.
    """
    if not _ops.is_sharded(tensor):
        return tensor
    if _ops.state(tensor).decoded:  # no donor has those
        return like_geometry(_ops.byte_view(_decoded_bytes(tensor)), tensor)
    return like_geometry(_ops.donor_bytes(tensor), tensor)


def _decoded_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a decoded tensor's storage, as a plain tensor on the host."""
    with torch.no_grad():
        nbytes = tensor.untyped_storage().nbytes()
        flat = tensor.detach().as_strided((nbytes // tensor.element_size(),), (1,), 0)
        return flat.clone().cpu()


def like_geometry(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bytes `data` (uint8, 1-D) seen with dtype, sizes, strides and offset of `like`."""
    item = like.element_size()
    if data.numel() == 0 or like.numel() == 0:
        return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
    if not _ops.is_sharded(data) and data.data_ptr() % item != 0:
        data = data.clone()  # a checkpoint that does not align its tensors
    return geometry_over(data, like, int(like.storage_offset()))


def geometry_over(data: torch.Tensor, like: torch.Tensor, offset: int) -> torch.Tensor:
    """A view of the bytes `data` (uint8, 1-D) with dtype, sizes and strides of `like`.

    `offset` is in elements. A lazy conjugation or negation of `like` is one of the view, too.
    """
    whole = data[: data.numel() // like.element_size() * like.element_size()].view(like.dtype)
    view = whole.as_strided(like.size(), like.stride(), offset)
    if like.is_conj():
        view = view.conj()
    return torch._neg_view(view) if like.is_neg() else view


def as_parameter(data: torch.Tensor, requires_grad: bool, like: torch.Tensor) -> nn.Parameter:
    """A parameter of the class of `like`, with what was set on it (not copied)."""
    made = torch.Tensor._make_subclass(type(like), data.detach(), requires_grad)
    made.__dict__.update(own_attributes(like))
    for name in copyreg._slotnames(type(like)):  # type: ignore[attr-defined]
        if hasattr(like, name):
            object.__setattr__(made, name, getattr(like, name))
    return made  # type: ignore[return-value]


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """What was set on a tensor by anybody but us."""
    return {name: value for name, value in tensor.__dict__.items() if name not in _NAMES}


def _rebuild(like: torch.Tensor, data: torch.Tensor, memo: dict[Any, Any]) -> torch.Tensor:
    """A copy of a sharded tensor over `data`, as its class would have copied it."""
    if type(like) is torch.Tensor:
        return data.requires_grad_(like.requires_grad)
    if type(like) is nn.Parameter:
        return nn.Parameter(data, like.requires_grad)
    if type(like).__deepcopy__ is nn.Parameter.__deepcopy__:
        copied = as_parameter(data, like.requires_grad, like)
        memo[id(like)] = copied
        for name, value in own_attributes(like).items():
            copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied
    # A class that copies itself in its own way does so with a plain one, whose data is then ours.
    plain = as_parameter(alias_of_donor(like.detach()), like.requires_grad, like)
    itself = plain.__deepcopy__(memo)  # type: ignore[no-untyped-call]
    memo.pop(id(plain), None)
    replace_data(itself, data)
    return itself  # type: ignore[no-any-return]


def copy_of_donor(tensor: torch.Tensor, memo: dict[Any, Any]) -> torch.Tensor:
    """An independent sharded tensor: a checkpoint is shared, other donors are copied once."""
    key = ("distorch", _ops.state(tensor).id)
    if key not in memo:
        root = _ops.share(tensor.detach())  # does not move, whatever another thread does
        info = _ops.state(root)
        if info.read_only:
            memo[key] = root
        else:
            data = _ops.donor_bytes(root).clone()
            copied = _donors.shard_on(info.tier, data, tensor.device, info.name)
            memo[key] = _ops.decoded_like(copied, root) if info.decoded else copied
    return like_storage(memo[key], tensor)


def like_storage(root: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A sharded tensor over the storage of `root` with the dtype and geometry of `like`."""
    nbytes = root.untyped_storage().nbytes()
    flat = root.detach()
    if flat.dtype != torch.uint8:
        flat = flat.as_strided((nbytes // flat.element_size(),), (1,), 0).view(torch.uint8)
    else:
        flat = flat.as_strided((nbytes,), (1,), 0)
    return like_geometry(flat, like)


def _not_shared() -> bool:
    return False


def _cannot_share(*args: Any) -> Any:
    raise PlacementError(
        "a sharded weight cannot be put into memory that processes share: send "
        "model.state_dict(), or distorch.undistribute(model) first and distribute it there"
    )


# What torch asks of a storage's memory in C functions that cannot carry our error.
_STORAGE_BEHAVIOUR: dict[str, Callable[..., Any]] = {
    "is_shared": _not_shared,
    "share_memory_": _cannot_share,
    "_share_fd_cpu_": _cannot_share,
    "_share_filename_cpu_": _cannot_share,
}


def _behaviour(
    parameter: torch.Tensor, stand_in: torch.Tensor | None
) -> dict[str, Callable[..., Any]]:
    ref = weakref.ref(parameter)

    def me() -> torch.Tensor:
        found = ref()
        if found is None:  # `shard(t).tolist()`: Python let go of the object to call its method
            found = stand_in
        if found is None:
            raise PlacementError(
                "the weight whose method this is does not exist any more: keep its "
                "module. distorch.materialize(weight) gives a tensor with an address"
            )
        return found

    def deepcopy(memo: dict[Any, Any]) -> torch.Tensor:
        p = me()
        if id(p) in memo:
            found: torch.Tensor = memo[id(p)]
            return found
        with torch.no_grad():
            copied = _rebuild(p, copy_of_donor(p, memo), memo)
        attach_behaviour(copied)
        memo[id(p)] = copied
        return copied

    def reduce_ex(protocol: int) -> tuple[Any, ...]:
        p = me()
        values = alias_of_donor(p.detach())
        if type(p) is torch.Tensor:
            values.requires_grad_(p.requires_grad)
            found: tuple[Any, ...] = values.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
            return found
        # As its class does it: a file of weights opens where distorch is not installed.
        return as_parameter(values, p.requires_grad, p).__reduce_ex__(protocol)  # type: ignore[no-any-return, no-untyped-call]

    def new(*args: Any, **kwargs: Any) -> torch.Tensor:
        p = me()
        return torch.empty(0, dtype=p.dtype, device=p.device).new(*args, **kwargs)

    def new_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        p = me()
        return torch.empty(0, dtype=p.dtype, device=p.device).new_tensor(*args, **kwargs)

    def data_ptr() -> int:
        p = me()
        # Only the caller's module tells who may have the number (see _COMPARE_ADDRESSES). Frame 0
        # is this function, 1 is `while_sharded`'s method, 2 is whoever called `data_ptr()`.
        asker = str(sys._getframe(2).f_globals.get("__name__"))
        if asker.startswith(_COMPARE_ADDRESSES):
            return _ops.state(p).id
        try:
            return torch.Tensor.data_ptr(p)
        except RuntimeError as error:  # our text, which torch threw as its own class
            raise PlacementError(str(error)) from None

    def while_sharded(name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
        # `p.data = plain` makes a plain parameter of it, with the behaviour of its class.
        def method(*args: Any, **kwargs: Any) -> Any:
            p = me()
            if _ops.is_sharded(p):
                return ours(*args, **kwargs)
            detach_behaviour(p)
            return getattr(type(p), name)(p, *args, **kwargs)

        return method

    behaviour: dict[str, Callable[..., Any]] = {
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce_ex,
        "new": new,
        "new_tensor": new_tensor,
        "data_ptr": data_ptr,
    }
    return {name: while_sharded(name, ours) for name, ours in behaviour.items()}


_NAMES = ("__deepcopy__", "__reduce_ex__", "new", "new_tensor", "data_ptr")


def attach_behaviour(parameter: torch.Tensor, stand_in: torch.Tensor | None = None) -> None:
    """Sets the behaviour of a sharded parameter on the instance, and on its storage's.

    `stand_in` is a view of it that answers when the object is a temporary.
    """
    parameter.__dict__.update(_behaviour(parameter, stand_in))
    # The storage keeps its Python object, so every view of the parameter has it.
    parameter.untyped_storage().__dict__.update(_STORAGE_BEHAVIOUR)


def detach_behaviour(parameter: torch.Tensor) -> None:
    """Gives the parameter the behaviour of its class back."""
    for name in _NAMES:
        parameter.__dict__.pop(name, None)


@torch.inference_mode(False)  # tensors made in it have no version to remember
def saved_values(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's values for a state dict: over the donor's bytes, nothing read yet."""
    key = _ops.state(tensor).id, _ops.moves(tensor)
    ref, version = _given_out.get(key, (None, 0))
    known = ref() if ref is not None else None
    if known is not None and known._version == version:
        return like_geometry(_ops.byte_view(known), tensor)
    values = alias_of_donor(tensor)
    _given_out[key] = weakref.ref(values, lambda _: _given_out.pop(key, None)), values._version
    return values


def replace_data(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """`parameter.data = value`, with the behaviour that goes with it, sharded or plain."""
    _ops.set_data(parameter, value.detach())
    if _ops.is_sharded(parameter):
        attach_behaviour(parameter)
    else:
        detach_behaviour(parameter)
