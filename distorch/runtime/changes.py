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
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distorch._native import Turn, calling, calls_of_this_thread, has_turn, waiting_for_turn
from distorch.errors import PlacementError

_CALL = nn.Module._call_impl.__code__
_MOMENT = 2e-4  # seconds
_PATIENCE = 60.0  # seconds


def parts_of(module: nn.Module) -> frozenset[int]:
    """The identities of the module and its parts. They are good while the module is there."""
    return frozenset(map(id, module.modules()))


def alone(module: nn.Module, *, nested: bool = False) -> AbstractContextManager[object]:
    """No other thread changes the module, or a part of it, meanwhile. Waits for such threads.

    PlacementError if this thread is in the middle of such a change already: a signal handler, a
    finalizer or a function for progress has come in between. With `nested` it may be, for a step of
    a change, and for whoever only reads. PlacementError also if this thread would wait while it
    changes another module: the other thread might be waiting for that one.
    """
    kind = type(module).__name__
    return Turn(
        parts_of(module), nested, PlacementError,
        f"this thread is in the middle of changing this {kind}, and was called back (by progress=, "
        "a signal or a finalizer): do it when that has returned",
        f"another thread changes this {kind}, and this thread is in the middle of changing another "
        "module: end that first",
    )  # fmt: skip


@contextmanager
def at_rest(module: nn.Module, *, whole_passes: bool = False) -> Iterator[None]:
    """No other thread runs operators in a call of the module, or of its parts, meanwhile.

    Waits for such threads, which stop where they call the next part. With `whole_passes` they are
    let go on until they return from the outermost call: for changes of values.

    PlacementError if one of them neither calls another part nor returns for a minute: it may be
    waiting for this thread. Then nothing was changed. Does nothing where Python has one thread.
    REQUIRES: a block of `alone` around it.
    """
    parts = parts_of(module)
    if len(sys._current_frames()) == 1:
        yield
        return
    me, process = threading.get_ident(), os.getpid()
    stopped: set[int] = set()
    seen: dict[int, float] = {}  # thread -> when it called a part, and was let go on
    over = False

    # Ctrl-C may come in the code below that ends this, but a turn always ends. So the turn decides.
    def stop(part: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or id(part) not in parts or over:
            return
        thread = threading.get_ident()
        if thread == me or not has_turn(me, parts):
            return
        if os.getpid() != process:
            # A child was forked meanwhile. It has no thread that would end the change. Each weight
            # is in its old place or in its new one, but values would be of two states.
            if whole_passes:
                raise PlacementError(_CUT_OFF.format(type(module).__name__))
            return
        if whole_passes and calls_of_this_thread(_CALL, parts) > 1:
            seen[thread] = time.monotonic()
            return
        stopped.add(thread)
        while not over and has_turn(me, parts):
            time.sleep(_MOMENT)

    hook = None
    try:
        hook = register_module_forward_pre_hook(stop)
        begun = time.monotonic()
        while running := calling(_CALL, parts) - stopped - waiting_for_turn(parts) - {me}:
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
        yield
    finally:
        over = True
        if hook is not None:
            hook.remove()


_CUT_OFF = (
    "another thread was changing the values of this {} when this process was forked, and only some "
    "of them were changed here: load the model anew, or fork when no other thread calls set_loras"
)


__all__ = ["alone", "at_rest"]
