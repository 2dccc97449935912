"""Forward passes of a module in other threads, held back while its tensors change.

Note [Forward passes at rest]
A weight that is resident (a plain tensor) before or after a change cannot change in one step. An
operator first reads how to dispatch on a tensor, then where its memory is, and `weight @ x` keeps
no reference that could be seen. So no operator of the module may run at that moment.

While a change waits for that, a hook stops every thread that calls the module or a part of it. A
thread that is inside a forward pass already goes on until it calls the next part, and stops there,
or until it returns. Which threads are inside is read from their Python frames, so that forward
passes cost nothing at any other time. Threads outside are not waited for. So operators that a
thread runs on a weight outside any module's forward pass are not seen.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_CALL = nn.Module._call_impl.__code__
_MOMENT = 2e-4  # seconds
_PATIENCE = 5.0  # seconds: a forward pass that takes no step so long is not waited for


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """No other thread runs operators in a forward pass of the module, or of its parts, meanwhile.

    Waits for them, at most five seconds: a forward pass that itself waits for this thread would
    never end. Does nothing in a program of one thread.
    """
    me = threading.get_ident()
    if len(sys._current_frames()) == 1:
        yield
        return
    parts = {id(part) for part in module.modules()}
    stopped: set[int] = set()
    ended = threading.Event()

    def stop(part: nn.Module, _: object) -> None:
        thread = threading.get_ident()
        if thread == me or id(part) not in parts:
            return
        stopped.add(thread)
        ended.wait()
        stopped.discard(thread)

    hook = register_module_forward_pre_hook(stop)
    try:
        latest = time.monotonic() + _PATIENCE
        while _inside(parts) - stopped - {me} and time.monotonic() < latest:
            time.sleep(_MOMENT)
        yield
    finally:
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
