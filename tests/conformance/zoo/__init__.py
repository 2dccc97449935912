# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights: name -> function that builds one with its inputs."""

from collections.abc import Callable

from ..checks import Built
from .diffusers_models import DIFFUSERS
from .peft_models import PEFT
from .plain import PLAIN
from .transformers_models import TRANSFORMERS


def zoo() -> dict[str, Callable[[], Built]]:
    """Every architecture by name."""
    return {**PLAIN, **TRANSFORMERS, **DIFFUSERS, **PEFT}


__all__ = ["DIFFUSERS", "PEFT", "PLAIN", "TRANSFORMERS", "zoo"]
