# SPDX-License-Identifier: Apache-2.0
"""What earlier nodes bound to a model, when a copy of the model takes its place.

Note [Bound to a model]
Most nodes leave patches, options and wrappers on the patcher, which get the model when it runs.
These go to the copy with the patcher's clone. Some nodes take parts of the model that they are
given, and work on these: a forward method bound to a block, a function that remembers a block, a
compiled block, hooks on layers. They would go on with the other model's weights, or change nothing
at all, and nobody would notice.

So what the clone holds is searched for parts of the old model. Methods and functions are made anew
with the same part of the copy, and so are the lists and dicts around them. Methods that were put on
a layer, and hooks, are put on the same layer of the copy. Other objects cannot be made anew, such
as a compiled block. Then the node has to come after the one that makes the copy, and the user is
told so.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import nn

from distorch.comfy import host
from distorch.errors import PlacementError

_FIELDS = "object_patches", "injections", "wrappers", "callbacks", "model_options"
# Where PyTorch keeps hooks of a layer, and how each of them is to be called.
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
_MOST_OBJECTS = 20_000  # that are looked at for what one object holds


def rebind(patcher: Any, before: nn.Module, after: nn.Module) -> None:
    """Makes what is bound to parts of `before` work on the same parts of `after`. PlacementError
    where it cannot be done.
    """
    if any(map(host.is_dynamic, patcher.additional_models.get("multigpu", ()))):
        raise PlacementError(
            "an earlier node made copies of the model for other GPUs, which dynamic VRAM loads: "
            "move that node so that it comes after this one"
        )
    pairs = _pairs(before, after)
    transfer = _Transfer(pairs)
    for field in _FIELDS:
        held = getattr(patcher, field, None)
        if held:
            setattr(patcher, field, transfer.of(held, field))
    for path, part, copy in pairs:
        _put_on_layer(part, copy, transfer, path)


def _pairs(before: nn.Module, after: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(path, part, the same part of the copy) of all that hold weights. PlacementError if a part
    has none: a node has put it there.
    """
    copies, found = dict(after.named_modules()), []
    for path, part in before.named_modules():
        if next(part.parameters(), None) is None:
            continue
        if path not in copies:
            raise PlacementError(
                f"an earlier node changed the layers of the model that it was given ({path!r} is "
                "not in the file), and this one makes a copy of the model: move that node so that "
                "it comes after this one"
            )
        found.append((path, part, copies[path]))
    return found


def _put_on_layer(part: nn.Module, copy: nn.Module, transfer: _Transfer, path: str) -> None:
    for name, value in vars(part).items():
        is_method = isinstance(value, types.MethodType | types.FunctionType | functools.partial)
        if is_method and callable(getattr(type(part), name, None)) and name not in vars(copy):
            vars(copy)[name] = transfer.of(value, f"{path}.{name}")
    for kind in _HOOKS:
        hooks, known = getattr(part, kind), getattr(copy, kind)
        if hooks and not known:  # a deep copy has them already
            known.update(transfer.of(dict(hooks), f"{path}.{kind}"))


class _Transfer:
    """Objects that hold parts of one model, made anew with parts of another."""

    def __init__(self, pairs: list[tuple[str, nn.Module, nn.Module]]) -> None:
        self._parts = {id(part): copy for _, part, copy in pairs}
        self._made: dict[int, Any] = {}  # by id of the object that it was made of
        self._kept: list[Any] = [pairs]  # so that no id is used again meanwhile

    def of(self, value: Any, what: str) -> Any:
        """The object with parts of the copy; the same object if it holds no part.

        PlacementError if it cannot be made anew. The message says where it is kept (`what`).
        """
        if id(value) in self._parts:
            return self._parts[id(value)]
        if id(value) in self._made:
            return self._made[id(value)]
        if not self._reaches(value):
            return value
        self._kept.append(value)
        made = self._anew(value, what)
        self._made[id(value)] = made
        return made

    def _anew(self, value: Any, what: str) -> Any:
        if type(value) is dict:
            found = self._made[id(value)] = {}
            found.update({key: self.of(part, f"{what} {key!r}") for key, part in value.items()})
            return found
        if type(value) is list:
            items = self._made[id(value)] = []
            items.extend(self.of(part, what) for part in value)
            return items
        if type(value) in (tuple, set):
            return type(value)(self.of(part, what) for part in value)
        if isinstance(value, types.MethodType):
            owner, function = self.of(value.__self__, what), self.of(value.__func__, what)
            return types.MethodType(function, owner)
        if isinstance(value, functools.partial):
            named = {name: self.of(part, what) for name, part in value.keywords.items()}
            args = (self.of(part, what) for part in value.args)
            return functools.partial(self.of(value.func, what), *args, **named)
        if isinstance(value, types.FunctionType):
            return self._function(value, what)
        raise PlacementError(
            f"an earlier node keeps hold of parts of the model that it was given ({what}: a "
            f"{type(value).__module__}.{type(value).__qualname__}), and this one makes a copy of "
            "the model: move that node so that it comes after this one"
        )

    def _function(self, value: types.FunctionType, what: str) -> types.FunctionType:
        what = f"{what}, {value.__module__}.{value.__qualname__}"
        cells = value.__closure__ or ()
        fresh = [self._made.setdefault(id(cell), types.CellType()) for cell in cells]
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, None, tuple(fresh) or None
        )
        self._made[id(value)] = made  # a function may remember itself
        self._kept.extend(cells)
        made.__defaults__ = self.of(value.__defaults__, what)
        made.__kwdefaults__ = self.of(value.__kwdefaults__, what)
        made.__dict__.update(self.of(dict(vars(value)), what))
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        for old, new in zip(cells, fresh, strict=True):
            contents = list(_contents(old))
            if contents and not list(_contents(new)):
                new.cell_contents = self.of(contents[0], what)
        return made

    def _reaches(self, value: Any) -> bool:
        """Whether an object holds a part, through closures, attributes and containers."""
        waiting, seen = deque([value]), {id(value)}
        while waiting and len(seen) < _MOST_OBJECTS:
            found = waiting.popleft()
            if id(found) in self._parts:
                return True
            for part in _references(found):
                if id(part) not in seen:
                    seen.add(id(part))
                    waiting.append(part)
        return False


def _references(value: Any) -> Iterator[Any]:
    """What an object holds, as far as nodes keep things in it. Not what a patcher holds."""
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield from _contents(cell)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
    elif not isinstance(value, type | types.ModuleType) and not hasattr(value, "add_patches"):
        yield from getattr(value, "__dict__", {}).values()


def _contents(cell: types.CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return
