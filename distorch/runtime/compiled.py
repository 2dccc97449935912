# SPDX-License-Identifier: Apache-2.0
"""torch.compile on modules with sharded parameters.

Note [Weights in compiled graphs]
Generated kernels read pointers, and a sharded weight has none. So while Dynamo traces, the modules
that own sharded parameters hand out `distorch::fetch(weight)` in their place: a node that brings
the real tensor, and whose memory goes back to the ring when the graph is done with it.
* A property can only sit on a class, so owners get a subclass of their own class, with its name,
  when the first compilation starts; before that nothing is touched.
* From then on the module's resident weights are sharded, too, over the memory in which they are:
  a graph that was compiled for one placement runs for every other.
* What Inductor has to know of these nodes is in `graphs`.
"""

from __future__ import annotations

import copyreg
import functools
import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distorch import _ops

_MARK = "_distorch_compiled"

# Distributed modules of this process, and what is done to them before something is compiled.
_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_prepare: list[Callable[[nn.Module], None]] = []


def before_compilation(prepare: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """A decorator: has `prepare` called on every watched module when a compilation starts."""
    _prepare.append(prepare)
    return prepare


def watch(module: nn.Module) -> None:
    """Remembers a module, weakly, for what has to be done before something is compiled."""
    _known.add(module)
    _listen()


class _Lasting(list[Any]):
    """Callbacks of Dynamo, of which torch._dynamo.reset() takes away all but ours.

    `reset()` calls `clear()` on the list, and there is nothing that says when it has done so. A
    module that is compiled after a reset would be traced without fetches, and fail. So the list
    itself keeps our callback.
    """

    def clear(self) -> None:
        self[:] = [callback for callback in self if callback is _start]


class _WhenImported(MetaPathFinder):
    """Calls `then(module)` behind the first import of a module."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def _register(callbacks: ModuleType) -> None:
    handler = callbacks.callback_handler
    handler.start_callbacks = _Lasting([*handler.start_callbacks, _start])


@functools.cache
def _listen() -> None:
    # Dynamo takes seconds and much memory to import: who never compiles never has it.
    name = "torch._dynamo.callback"
    if name in sys.modules:
        _register(sys.modules[name])
    else:
        sys.meta_path.insert(0, _WhenImported(name, _register))


def _start(*args: Any) -> None:
    modules = list(_known)
    if not modules:
        return
    from distorch.runtime import graphs  # loads Inductor

    graphs.set_passes()
    for module in modules:
        for prepare in _prepare:
            prepare(module)


def _fetching(key: str) -> property:
    """A parameter that is a fetch while Dynamo traces, and itself otherwise."""

    def get(self: nn.Module) -> Any:
        weight = self._parameters.get(key)
        if weight is None:
            if key in self._parameters:
                return None
            raise AttributeError(key)
        if torch.compiler.is_dynamo_compiling():
            return _ops.fetch_in_graph(weight, 0)
        return weight

    def put(self: nn.Module, value: Any) -> None:
        # Reached when it is no parameter any more: `del m.weight; m.weight = a_tensor`.
        stop_fetching(self)
        setattr(self, key, value)

    return property(get, put)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """Copies and pickles are of the module's own class."""
    ours = type(self)
    made = super(ours, self).__reduce_ex__(protocol)
    if made[:2] == (copyreg.__newobj__, (ours,)):  # type: ignore[attr-defined]
        # pickle wants the class of what it pickles there; the older way it takes any.
        reconstructor = copyreg._reconstructor  # type: ignore[attr-defined]
        return (reconstructor, (_base_of(ours), object, None), *made[2:])
    theirs = tuple(_base_of(item) if item is ours else item for item in made[1])
    return (made[0], theirs, *made[2:])


@functools.cache
def _fetching_class(base: type, keys: frozenset[str]) -> type:
    namespace: dict[str, Any] = {key: _fetching(key) for key in sorted(keys)}
    namespace |= {
        _MARK: base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
    }
    return type(base)(base.__name__, (base,), namespace)


def _base_of(kind: type) -> type:
    found: type = kind.__dict__.get(_MARK, kind)
    return found


def restorer(owner: nn.Module) -> Callable[[], None]:
    """A step that gives a module the class back that it has now."""
    return functools.partial(setattr, owner, "__class__", type(owner))


def start_fetching(owner: nn.Module, keys: Iterable[str]) -> None:
    """Has a module hand out fetches of these parameters to whoever traces it.

    Parameters are looked up on the instance's class, then in `_parameters`. Only a property of the
    class comes before that, and the module's own class also belongs to modules that are not ours.
    So this one instance gets a subclass, as torch.nn.utils.parametrize does it.
    """
    owner.__class__ = _fetching_class(_base_of(type(owner)), frozenset(keys))


def stop_fetching(owner: nn.Module) -> None:
    """Gives a module its own class back, as `start_fetching` found it."""
    if _base_of(type(owner)) is not type(owner):
        owner.__class__ = _base_of(type(owner))
