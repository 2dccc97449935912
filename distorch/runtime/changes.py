# SPDX-License-Identifier: Apache-2.0
"""Threads that change a module, and others that use it meanwhile.

Note [Changes by threads]
A change reads how a module is, decides, and then replaces weights. Two at the same time would each
undo what the other does. So a thread that changes a module is alone with it: a second change of the
module, of a part of it, or of a module that shares a part with it, waits (`alone`). Changes of
other modules do not. See also Note [Forward passes at rest].

Note [Forward passes at rest]
A weight that is resident (a plain tensor) before or after a change cannot change in one step. An
operator first reads how to dispatch on a tensor, then where its memory is, and `weight @ x` keeps
no reference that could be seen. So no operator of the module may run at that moment.

While a change waits for that, a hook stops every thread that calls the module or a part of it. A
thread that is inside such a call already goes on until it calls the next part, and stops there, or
until it returns. If the change gives weights other values, a pass that has begun is let go on to
its end: its last layers would else compute with new values, and its first ones had the old. Then
only new passes are stopped. Which threads are inside is read from their Python frames, so that
forward passes cost nothing at any other time.

A thread may be inside a forward pass and want to change the module itself, in a hook. While it
waits for its turn it runs no operator: it is at rest, too.

Threads that use a weight outside such calls are not seen: backward passes and optimizers, a parent
of the module that uses a weight of the module itself, graphs that were compiled or captured.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distorch.errors import PlacementError

_CALL = nn.Module._call_impl.__code__
_MOMENT = 2e-4  # seconds
_PATIENCE = 60.0  # seconds


@dataclass(eq=False)
class _Change:
    """A block of `alone`."""

    thread: int
    parts: frozenset[int]


_turns = threading.Condition()  # guards the two below
_under_way: list[_Change] = []
_waiting: dict[int, frozenset[int]] = {}  # a thread that waits in `alone`, and what for
_resting = threading.local()  # .parts: the modules that are at rest for this thread


def parts_of(module: nn.Module) -> frozenset[int]:
    """The identities of the module and its parts. They are good while the module is there."""
    return frozenset(map(id, module.modules()))


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """No other thread changes the module, or a part of it, meanwhile.

    Waits for such threads. Blocks of one thread may be nested. PlacementError if this thread would
    wait in the middle of changing another module: the other thread might be waiting for that one.
    """
    mine = _Change(threading.get_ident(), parts_of(module))

    def is_free() -> bool:
        return not any(
            other.parts & mine.parts for other in _under_way if other.thread != mine.thread
        )

    try:
        with _turns:
            if not is_free() and any(change.thread == mine.thread for change in _under_way):
                raise PlacementError(
                    f"another thread changes this {type(module).__name__}, and this thread is in "
                    "the middle of changing another module: end that first"
                )
            _waiting[mine.thread] = mine.parts
            _turns.wait_for(is_free)
            _under_way.append(mine)
            del _waiting[mine.thread]
        yield
    finally:
        with _turns:
            _waiting.pop(mine.thread, None)  # an interrupt
            if mine in _under_way:
                _under_way.remove(mine)
            _turns.notify_all()


def _forget_other_threads() -> None:
    """A forked child has one thread. Nobody would end what others have begun."""
    global _turns  # noqa: PLW0603
    _turns = threading.Condition()
    me = threading.get_ident()
    _under_way[:] = [change for change in _under_way if change.thread == me]
    _waiting.clear()


os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def at_rest(module: nn.Module, *, whole_passes: bool = False) -> Iterator[None]:
    """No other thread runs operators in a call of the module, or of its parts, meanwhile.

    Waits for such threads, which stop where they call the next part. With `whole_passes` they are
    let go on until they return from the outermost call: for changes of values.

    PlacementError if one of them neither calls another part nor returns for a minute: it may be
    waiting for this thread. Then nothing was changed. Does nothing where Python has one thread.
    Blocks of one thread may be nested.
    """
    parts = parts_of(module)
    outer: frozenset[int] = getattr(_resting, "parts", frozenset())
    if parts <= outer or len(sys._current_frames()) == 1:
        yield
        return
    me, process = threading.get_ident(), os.getpid()
    stopped: set[int] = set()
    seen: dict[int, float] = {}  # thread -> when it called a part, and was let go on
    ended = threading.Event()

    def stop(part: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or id(part) not in parts:
            return
        if os.getpid() != process:
            # A child forked meanwhile has this hook, but not the thread that would end the wait.
            # Each weight is in its old place or in its new one. Values would be of two states.
            if whole_passes:
                raise PlacementError(_CUT_OFF.format(type(module).__name__))
            return
        thread = threading.get_ident()
        if thread == me:
            return
        if whole_passes and _is_inner(sys._getframe(), parts):
            seen[thread] = time.monotonic()
            return
        stopped.add(thread)
        ended.wait()

    hook = None
    try:
        hook = register_module_forward_pre_hook(stop)
        begun = time.monotonic()
        while running := _inside(parts) - stopped - _waiting_for(parts) - {me}:
            latest = max([begun, *(seen[thread] for thread in running if thread in seen)])
            if time.monotonic() > latest + _PATIENCE:
                names = {thread.ident: thread.name for thread in threading.enumerate()}
                raise PlacementError(
                    f"a forward pass of this {type(module).__name__} is running in another thread "
                    f"({names.get(min(running), 'not a thread of Python')}), and has called no "
                    f"module for {_PATIENCE:.0f} seconds: its weights cannot be changed now. Is it "
                    "waiting for this thread? Nothing was changed"
                )
            time.sleep(_MOMENT)
        _resting.parts = outer | parts
        yield
    finally:
        _resting.parts = outer
        if hook is not None:
            hook.remove()
        ended.set()


_CUT_OFF = (
    "another thread was changing the values of this {} when this process was forked, and only some "
    "of them were changed here: load the model anew, or fork when no other thread calls set_loras"
)


def _inside(parts: frozenset[int]) -> set[int]:
    """The threads that are inside a call of one of these modules."""
    return {thread for thread, frame in sys._current_frames().items() if _calls(frame, parts)}


def _waiting_for(parts: frozenset[int]) -> set[int]:
    """The threads that wait until this change of these modules has ended."""
    with _turns:
        return {thread for thread, wanted in _waiting.items() if wanted & parts}


def _is_inner(frame: FrameType | None, parts: frozenset[int]) -> bool:
    """Whether the call of a module that this frame belongs to is inside of another one."""
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame is not None and _calls(frame.f_back, parts)


def _calls(frame: FrameType | None, parts: frozenset[int]) -> bool:
    while frame is not None:
        if frame.f_code is _CALL and id(frame.f_locals.get("self")) in parts:
            return True
        frame = frame.f_back
    return False


__all__ = ["alone", "at_rest"]
