# SPDX-License-Identifier: Apache-2.0
"""Around the host's sampling: the current device, the bar on the node, and memory that ran out.

Newer versions of the host make the model's device the current one while it samples. Here it is so
for all: kernels of other packs are started on the current device, wherever their tensors are.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from distorch.comfy import host, live
from distorch.comfy.patcher import advice, is_ours, placed


def timed_sampling(executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
    """The host calls it once models are loaded, in place of its own function: `executor`."""
    patcher = getattr(guider, "model_patcher", None)
    if patcher is None or not is_ours(patcher):
        return executor(guider, *args, **kwargs)
    watching = patcher.node is not None and host.page_waits()
    watch = live.watched(patcher.model, patcher.show) if watching else contextlib.nullcontext()
    begin = time.monotonic()
    try:
        with host.computing_on(str(patcher.load_device)), watch:
            return executor(guider, *args, **kwargs)
    except torch.OutOfMemoryError as error:
        raise advice(error, patcher.placement) from error
    finally:
        placed(patcher.model).sampling_seconds += time.monotonic() - begin
