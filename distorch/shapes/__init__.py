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

__all__ = ["MODELS", "Request", "Shape", "estimated", "model_named", "shape_named"]


class Shape(NamedTuple):
    """A model that is built in: its class, what a step is made of if nothing else is asked for, and
    in words what a step is and what is left out.
    """

    make: Callable[[], nn.Module]
    usual: Request
    says: str


class _Steps(Protocol):
    def step(self, request: Request) -> torch.Tensor: ...


MODELS = {
    "flux-dev": Shape(
        Flux,
        Request(size=(1024, 1024), tokens=512),
        "FLUX.1-dev, one step of sampling. The transformer alone: text encoders and VAE are left "
        "out",
    ),
    "qwen-image": Shape(
        QwenImage,
        Request(size=(1024, 1024), tokens=256),
        "Qwen-Image, one pass; a step with a negative prompt takes two. The transformer alone: "
        "text encoder and VAE are left out",
    ),
    "wan22-14b": Shape(
        Wan,
        Request(size=(832, 480), frames=81, tokens=512),
        "Wan 2.2 A14B, one pass; a step with a negative prompt takes two. One of the two experts: "
        "the other one, text encoder and VAE are left out",
    ),
    "llama-70b": Shape(
        Llama,
        Request(tokens=1),
        "Llama 3 70B, so many new tokens at once, without those before (no KV cache)",
    ),
}


def shape_named(name: str) -> Shape:
    """A built-in model by its name. SpecError: there is none of that name."""
    if name not in MODELS:
        raise SpecError(f"model={name!r}: expected one of the models {', '.join(MODELS)}")
    return MODELS[name]


def model_named(name: str) -> nn.Module:
    """A built-in model on the meta device, in bfloat16. SpecError: there is none of that name."""
    shape = shape_named(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return shape.make().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def estimated(model: nn.Module, request: Request, machine: Machine) -> Step:
    """A step of a built-in model on a machine."""
    steps: _Steps = model  # type: ignore[assignment]
    with torch.inference_mode(), estimate_step(model, machine) as step:
        steps.step(request)
    return step
