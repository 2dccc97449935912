# SPDX-License-Identifier: Apache-2.0
"""What earlier nodes bound to a model, when a copy of the model takes its place.

Note [Bound to a model]
Most nodes leave a wish on the patcher: patches, options, functions that get the model when it runs.
Such wishes go to the copy with the patcher's clone. Some nodes take parts of the model that they
are given, and work on these: a forward method bound to a block, a compiled block, hooks on layers.
They would go on with the other model's weights, or change nothing at all, and nobody would notice.

A method that is bound to a part can be bound to the same part of the copy. For everything else the
node has to stand behind the one that makes the copy, and the user is told so.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from distorch.comfy import host
from distorch.errors import PlacementError

_DEEPEST = 8  # steps from what the patcher holds to the part of a model


def rebind(patcher: Any, before: nn.Module, after: nn.Module) -> None:
    """Makes what is bound to parts of `before` work on the same parts of `after`. PlacementError
    where it cannot be done.
    """
    patcher.object_patches = {
        key: _bound_anew(value, before, after) for key, value in patcher.object_patches.items()
    }
    if any(map(host.is_dynamic, patcher.additional_models.get("multigpu", ()))):
        raise PlacementError(
            "a node in front of this one made copies of the model for other GPUs, which dynamic "
            "VRAM loads: put that node behind this one"
        )
    parts = {id(part) for part in before.modules() if next(part.parameters(), None) is not None}
    for what, held in _wishes(patcher):
        if _reaches(held, parts, set(), _DEEPEST):
            raise PlacementError(
                f"a node in front of this one works on parts of the model that it was given "
                f"({what}), and this one makes a copy of the model: put that node behind it"
            )


def _wishes(patcher: Any) -> Iterator[tuple[str, Any]]:
    for key, value in patcher.object_patches.items():
        yield f"object patch {key!r}", value
    for kind, name in (
        ("injections", "injection"),
        ("wrappers", "wrapper"),
        ("callbacks", "callback"),
    ):
        for key, value in getattr(patcher, kind, {}).items():
            yield f"{name} {key!r}", value


def _bound_anew(value: Any, before: nn.Module, after: nn.Module) -> Any:
    if isinstance(value, functools.partial):
        return functools.partial(
            _bound_anew(value.func, before, after),
            *(_bound_anew(part, before, after) for part in value.args),
            **{name: _bound_anew(part, before, after) for name, part in value.keywords.items()},
        )
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        for path, part in before.named_modules():
            if part is value.__self__:
                return types.MethodType(value.__func__, after.get_submodule(path))
    return value


def _reaches(value: Any, parts: set[int], seen: set[int], left: int) -> bool:
    """Whether an object holds one of the parts, through closures, attributes and containers."""
    if id(value) in seen or left == 0:
        return False
    seen.add(id(value))
    if isinstance(value, nn.Module):
        return any(id(part) in parts for part in value.modules())
    return any(_reaches(part, parts, seen, left - 1) for part in _held_by(value))


def _held_by(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        yield from _closure(value)
    elif not isinstance(value, type | types.ModuleType) and not hasattr(value, "add_patches"):
        yield from getattr(value, "__dict__", {}).values()


def _closure(function: Callable[..., Any]) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
