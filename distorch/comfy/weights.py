# SPDX-License-Identifier: Apache-2.0
"""The host's patches on weights that live on donors: merged in float32, redone only on change.

Note [Originals of the host]
Originals of patched weights are kept in the patcher's `backup`, where the host looks for them: a
handle where the weight is on a donor, a tensor on the offload device where it was resident. What
is on a weight now is written down on the inner model, which all clones of a patcher share.

Note [The host's quantised weights]
They are several tensors in one. The host's layers say how such a weight becomes numbers
(`convert_weight`) and how patched numbers become such a weight again (`set_weight`, with a new
scale and seeded rounding); its parts go to the donor one by one.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

from distorch import _donors, _ops
from distorch._behaviour import attach_behaviour
from distorch.runtime import distribution, placing, wrapped
from distorch.runtime.groups import size_of
from distorch.runtime.staging import alone, current_place

Backup = namedtuple("Backup", ["weight", "inplace_update"])
_NARROW_BYTES = 1


def signature(patches: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """What a list of the host's patches says, for comparison: objects by identity, held."""
    return [(patch[0], _parts(patch[1]), *patch[2:]) for patch in patches]


def _parts(adapter: Any) -> Any:
    """An adapter made anew from the same file is the same: its tensors are."""
    weights = getattr(adapter, "weights", None)
    return (type(adapter), *weights) if isinstance(weights, tuple | list) else adapter


def same(old: Any, new: Any) -> bool:
    """Whether two signatures say the same."""
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        return len(old) == len(new) and all(map(same, old, new))
    if isinstance(old, int | float | str) and isinstance(new, int | float | str):
        return type(old) is type(new) and old == new
    return old is new


def owner_of(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that owns a weight, and its name there."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def set_weight(model: nn.Module, key: str, value: torch.Tensor) -> None:
    """A new parameter under this name; others that shared it keep theirs, as in the host."""
    owner, name = owner_of(model, key)
    if wrapped.is_wrapper(value):
        parameter = wrapped.as_parameter(value)
    else:
        parameter = nn.Parameter(value.detach(), requires_grad=False)
    if _ops.is_sharded(parameter):
        attach_behaviour(parameter)
    owner._parameters[name] = parameter


# It moved, and its old place warns.
_seed_of = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed


def merged(
    model: nn.Module, key: str, patches: list[Any], original: torch.Tensor, compute: torch.device,
    full: bool,
) -> torch.Tensor:  # fmt: skip
    """The patched weight, on `compute`: float32 until it is rounded once."""
    present, set_function, convert = comfy.model_patcher.get_key_weight(model, key)
    value = original.to(device=compute, dtype=torch.float32, copy=True)
    if convert is not None:
        value = convert(value, inplace=True)
    value = comfy.lora.calculate_weight(patches, value, key, intermediate_dtype=torch.float32)
    seed = _seed_of(key)
    if full and wrapped.is_wrapper(original):
        return value.to(original.dtype)
    if set_function is not None:
        if wrapped.is_wrapper(original) and not wrapped.is_wrapper(present):
            # It asks the present weight for its form.
            set_weight(model, key, wrapped.rebuilt(original, lambda _, p: p.to(compute)))
        return set_function(value, inplace_update=False, seed=seed, return_weight=True)
    if full and original.element_size() == _NARROW_BYTES:
        return value.to(torch.bfloat16)
    return comfy.float.stochastic_rounding(value, original.dtype, seed=seed)


def _put(
    model: nn.Module, key: str, value: torch.Tensor, place: str, compute: torch.device
) -> None:
    def put(name: str, part: torch.Tensor) -> torch.Tensor:
        if _ops.is_sharded(part):  # an original's, or one that the host took over as it was
            part = part.clone()
        if place == str(compute) or (name and wrapped.stays(part)):
            return part.to(compute)
        whole = f"{key}.{name}" if name else key
        return _donors.shard_on(place, alone(part.contiguous()), compute, whole)

    # The old one goes first, so that a donor that is nearly full has room for the new one.
    set_weight(model, key, value)
    set_weight(model, key, wrapped.rebuilt(value, put))


@torch.inference_mode(False)
@torch.no_grad()
def repatch(
    model: nn.Module,
    patches: dict[str, list[Any]],
    backup: dict[str, Any],
    applied: dict[str, Any],
    *,
    offload: torch.device,
    full: bool,
    progress: Callable[[int], None],
) -> int:
    """Gives every weight of a distributed model these patches and no others; how many changed."""
    compute = torch.device(distribution.distribution_of(model).plan.compute)
    wanted = {key: (signature(found), full) for key, found in patches.items() if found}
    changed = [key for key in applied if not same(applied[key], wanted.get(key))]
    changed += [key for key in wanted if key not in applied]
    for key in changed:
        weight = comfy.utils.get_attr(model, key)
        place, nbytes = current_place(weight), size_of(weight)
        if key not in backup:
            backup[key] = Backup(_kept(weight, place, compute, offload), False)
        del weight  # or its memory would stay until the new one is there
        original = backup[key].weight
        if key in wanted:
            value = merged(model, key, patches[key], original, compute, full)
            _put(model, key, value, place, compute)
            applied[key] = wanted[key]
        else:
            _restore(model, key, original, place, compute)
            del backup[key], applied[key]
        progress(nbytes)
    if changed:
        placing.refresh(model)
    return len(changed)


def _kept(
    weight: torch.Tensor, place: str, compute: torch.device, offload: torch.device
) -> torch.Tensor:
    """What restores a weight later: donors' own bytes, a copy of what is on an accelerator."""
    stays = offload == compute or (wrapped.is_on_donor(weight) and place in ("cpu", "disk"))
    return wrapped.rebuilt(weight, lambda _, p: p.detach() if stays else p.detach().to(offload))


def _restore(
    model: nn.Module, key: str, original: torch.Tensor, place: str, compute: torch.device
) -> None:
    if current_place(original) == place and original.device == compute:
        set_weight(model, key, original)
    else:
        _put(model, key, original, place, compute)


@torch.inference_mode(False)
@torch.no_grad()
def restore_all(model: nn.Module, backup: dict[str, Any], applied: dict[str, Any]) -> None:
    """Takes every patch off."""
    if not backup:
        applied.clear()
        return
    compute = torch.device(distribution.distribution_of(model).plan.compute)
    for key in list(backup):
        place = current_place(comfy.utils.get_attr(model, key))
        _restore(model, key, backup[key].weight, place, compute)
        del backup[key]
    applied.clear()
    placing.refresh(model)
