# SPDX-License-Identifier: Apache-2.0
"""`torch.autocast` on the simulated devices: operators that it runs in the narrow dtype.

PyTorch has kernels of autocast for the devices that it knows. Others bring their own, as here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_NARROW = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d",
    "scaled_dot_product_attention",
)  # fmt: skip


def _narrow(operator: Any) -> Any:
    def run(*arguments: Any, **named: Any) -> Any:
        dtype = torch.get_autocast_dtype("sim")

        def cast(value: Any) -> Any:
            takes_part = (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.dtype != torch.float64
                and value.device.type == "sim"
            )
            return value.to(dtype) if takes_part else value

        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            return operator(*tree_map(cast, arguments), **tree_map(cast, named))

    return run


def install() -> torch.library.Library:
    """From now on. It holds as long as what it gives is kept."""
    library = torch.library.Library("aten", "IMPL")
    for name in _NARROW:
        operator = getattr(torch.ops.aten, name).default
        library.impl(name, _narrow(operator), "AutocastPrivateUse1")
    return library
