# SPDX-License-Identifier: Apache-2.0
"""Models of transformers: `transformers.txt` says which class stands for which model type."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..checks import Built
from .inputs import find
from .shrink import tiny_settings

_LARGEST = 4_000_000  # numbers in a model that still counts as tiny


def build(kind: str, class_name: str) -> Built:
    """A tiny model of a type, with inputs that it runs with. RuntimeError when that cannot be."""
    import transformers

    transformers.logging.set_verbosity_error()
    config_class = transformers.CONFIG_MAPPING[kind]
    settings = tiny_settings(config_class)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_class = getattr(transformers, class_name)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config_class(**settings)).parameters())
        if size > _LARGEST:
            raise RuntimeError(f"still {size:,} numbers")
        torch.manual_seed(0)
        module = model_class(config_class(**settings)).eval()
        return Built(module, find(copy.deepcopy(module)))


def _listed() -> dict[str, Callable[[], Built]]:
    lines = (Path(__file__).parent / "transformers.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return {kind: partial(build, kind, class_name) for kind, class_name in pairs}


TRANSFORMERS = _listed()
