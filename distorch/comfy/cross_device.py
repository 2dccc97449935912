# SPDX-License-Identifier: Apache-2.0
"""A module that computes on another device than the model that calls it, as a ControlNet may."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CALLER = "_distorch_caller"  # the device of whoever called the module last


def bridge(module: nn.Module) -> None:
    """Brings arguments to where the module is loaded, and results to where they are wanted.

    The host writes where it is loaded into `module.device`.
    """
    if _CALLER not in vars(module):
        vars(module)[_CALLER] = None
        module.register_forward_pre_hook(_bring, with_kwargs=True)
        module.register_forward_hook(_give_back)


def _bring(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    given = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
    vars(module)[_CALLER] = given[0].device if given else None
    return _moved(args, module.device), _moved(kwargs, module.device)


def _give_back(module: nn.Module, args: Any, output: Any) -> Any:
    return _moved(output, vars(module)[_CALLER])


def _moved(value: Any, device: Any) -> Any:
    """The same with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(part, device) for part in value))
    if type(value) in (list, tuple):
        return type(value)(_moved(part, device) for part in value)
    return value
