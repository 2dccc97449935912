# SPDX-License-Identifier: Apache-2.0
"""Well-known models as shapes: for plans and predictions before anything is downloaded.

They have no values, and their classes need no other library. What they are made of was taken from
their published configurations. tests/shapes holds them against the classes of diffusers and
transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import nn

from distorch.errors import SpecError
from distorch.machine.profiles import Machine
from distorch.prediction import Step, estimate_step
from distorch.shapes.flux import Flux
from distorch.shapes.llama import Llama
from distorch.shapes.qwen_image import QwenImage
from distorch.shapes.request import Request
from distorch.shapes.wan import Wan

__all__ = ["MODELS", "Request", "Shape", "estimated", "model_named"]


class Shape(NamedTuple):
    """A model that is built in: its class, and of what a step is, in words."""

    make: Callable[[], nn.Module]
    says: str


class _Steps(Protocol):
    def step(self, request: Request) -> torch.Tensor: ...


MODELS = {
    "flux-dev": Shape(Flux, "FLUX.1-dev; a step of sampling, with 512 tokens of text"),
    "qwen-image": Shape(QwenImage, "Qwen-Image; a pass of sampling, with 256 tokens of text"),
    "wan22-14b": Shape(Wan, "one expert of Wan 2.2 A14B; a pass of sampling, 512 tokens of text"),
    "llama-70b": Shape(Llama, "Llama 3 70B; one new token, or so many tokens at once"),
}


def model_named(name: str) -> nn.Module:
    """A built-in model on the meta device, in bfloat16. SpecError: there is none of that name."""
    if name not in MODELS:
        raise SpecError(f"model={name!r}: expected one of the models {', '.join(MODELS)}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return MODELS[name].make().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def estimated(model: nn.Module, request: Request, machine: Machine) -> Step:
    """A step of a built-in model on a machine."""
    steps: _Steps = model  # type: ignore[assignment]
    with torch.inference_mode(), estimate_step(model, machine) as step:
        steps.step(request)
    return step
