# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a module in other threads, held back while its tensors change.

Note [Forward passes at rest]
A weight that is resident (a plain tensor) before or after a change cannot change in one step. An
operator first reads how to dispatch on a tensor, then where its memory is, and `weight @ x` keeps
no reference that could be seen. So no operator of the module may run at that moment.

While a change waits for that, a hook stops every thread that calls the module or a part of it. A
thread that is inside such a call already goes on until it calls the next part, and stops there, or
until it returns. Which threads are inside is read from their Python frames, so that forward passes
cost nothing at any other time.

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
from types import FrameType

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distorch.errors import PlacementError

_CALL = nn.Module._call_impl.__code__
_MOMENT = 2e-4  # seconds
_PATIENCE = 60.0  # seconds


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """No other thread runs operators in a call of the module, or of its parts, meanwhile.

    Waits for such threads. PlacementError if one of them neither calls another part nor returns for
    a minute: it may be waiting for this thread. Then nothing was changed. Does nothing where Python
    has one thread.
    """
    if len(sys._current_frames()) == 1:
        yield
        return
    me, process = threading.get_ident(), os.getpid()
    parts = {id(part) for part in module.modules()}
    stopped: set[int] = set()
    ended = threading.Event()

    def stop(part: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or id(part) not in parts:
            return
        # A child forked meanwhile has this hook, but not the thread that would end the wait.
        if os.getpid() != process:
            return
        if (thread := threading.get_ident()) != me:
            stopped.add(thread)
            ended.wait()

    hook = None
    try:
        hook = register_module_forward_pre_hook(stop)
        latest = time.monotonic() + _PATIENCE
        while running := _inside(parts) - stopped - {me}:
            if time.monotonic() > latest:
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
        if hook is not None:
            hook.remove()
        ended.set()


def _inside(parts: set[int]) -> set[int]:
    """The threads that are inside a call of one of these modules."""
    return {thread for thread, frame in sys._current_frames().items() if _calls(frame, parts)}


def _calls(frame: FrameType | None, parts: set[int]) -> bool:
    while frame is not None:
        if frame.f_code is _CALL and id(frame.f_locals.get("self")) in parts:
            return True
        frame = frame.f_back
    return False


__all__ = ["at_rest"]
