# SPDX-License-Identifier: Apache-2.0
"""What a distributed pipeline answers to other ways of offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from distorch.errors import PlacementError

_OTHER_WAYS = (
    "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload",
)  # fmt: skip


def refuse_other_offloading(pipe: Any) -> Any:
    """Gives the pipeline methods of its own that say what to do instead; returns it.

    The methods are set on the object, so its class and other pipelines stay as they are. Moves to
    another device are refused by the modules themselves.
    """
    for name in _OTHER_WAYS:
        if hasattr(pipe, name):
            pipe.__dict__[name] = _refusal(name)
    return pipe


def allow_other_offloading(pipe: Any) -> Any:
    """Takes these methods away again; returns the pipeline."""
    for name in _OTHER_WAYS:
        pipe.__dict__.pop(name, None)
    return pipe


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise PlacementError(
            f"{name}(): distorch brings this pipeline's weights to the compute device already, and "
            "both together would move them twice. Leave the call out. For less memory, give a "
            "smaller share: distorch.integrations.distribute_pipeline(pipe, 'cuda:0,2gb;cpu,*'). "
            "undistribute_pipeline(pipe) gives a plain pipeline"
        )

    refuse.__name__ = name
    return refuse
