# SPDX-License-Identifier: Apache-2.0
"""The built-in models against the classes whose shapes they have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
import transformers
from torch import nn

import distorch
from distorch import shapes

MACHINE = distorch.Machine.named("rtx3090-pcie4x16-64gb-nvme4")
PARAMETERS = {  # billions, as published
    "flux-dev": 11.90,
    "qwen-image": 20.43,
    "wan22-14b": 14.29,
    "llama-70b": 70.55,
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Published(NamedTuple):
    """A class with its published configuration, and how its step is called."""

    make: Callable[[], nn.Module]
    call: Callable[[Any], object]
    request: shapes.Request


def flux(model: Any) -> object:
    ids = torch.zeros(64 * 64, 3), torch.zeros(512, 3)
    return model(
        meta(1, 4096, 64), meta(1, 512, 4096), meta(1, 768), timestep=meta(1), guidance=meta(1),
        img_ids=ids[0], txt_ids=ids[1],
    )  # fmt: skip


def qwen(model: Any) -> object:
    return model(
        meta(1, 4096, 64), meta(1, 256, 3584), None, timestep=meta(1), img_shapes=[[(1, 64, 64)]]
    )


def wan(model: Any) -> object:
    return model(meta(1, 16, 21, 90, 160), timestep=torch.ones(1), encoder_hidden_states=meta(
        1, 512, 4096
    ))  # fmt: skip


def llama(model: Any) -> object:
    words = torch.zeros(1, 64, dtype=torch.int64)
    return model(words, use_cache=False, logits_to_keep=1)


def llama_config() -> Any:
    return transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip


PUBLISHED = {
    "flux-dev": Published(
        lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        flux,
        shapes.MODELS["flux-dev"].usual,
    ),
    "qwen-image": Published(
        diffusers.QwenImageTransformer2DModel, qwen, shapes.MODELS["qwen-image"].usual
    ),
    "wan22-14b": Published(
        diffusers.WanTransformer3DModel,
        wan,
        shapes.Request(size=(1280, 720), frames=81, tokens=512),
    ),
    "llama-70b": Published(
        lambda: transformers.LlamaForCausalLM(llama_config()), llama, shapes.Request(tokens=64)
    ),
}


def published(name: str) -> nn.Module:
    with torch.device("meta"):
        model = PUBLISHED[name].make().to(torch.bfloat16).eval().requires_grad_(False)
    for part in model.modules():  # as from_pretrained leaves them
        for child, module in part.named_children():
            if any(child == kept for kept in getattr(model, "_keep_in_fp32_modules", None) or ()):
                module.float()
        for own, parameter in part.named_parameters(recurse=False):
            if own in (getattr(model, "_keep_in_fp32_modules", None) or ()):
                parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_of_the_class(name):
    theirs = published(name).state_dict()
    ours = shapes.model_named(name).state_dict()
    assert list(ours) == list(theirs)
    assert {n: tuple(t.shape) for n, t in ours.items()} == {
        n: tuple(t.shape) for n, t in theirs.items()
    }
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    total = sum(tensor.numel() for tensor in ours.values()) / 1e9
    assert total == pytest.approx(PARAMETERS[name], abs=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_uses_them_as_the_class_does(name):
    """In the same order, and for as long as the class's own forward is estimated to take."""
    model = published(name)
    with torch.no_grad(), distorch.estimate_step(model, MACHINE) as theirs:
        PUBLISHED[name].call(model)
    ours = shapes.estimated(shapes.model_named(name), PUBLISHED[name].request, MACHINE)
    matrices = {n for n, t in model.named_parameters() if t.dim() > 1}
    assert [n for n in ours.weights if n in matrices] == [
        n for n in theirs.weights if n in matrices
    ]
    assert set(ours.weights) == set(theirs.weights)
    assert ours.seconds == pytest.approx(theirs.seconds, rel=0.05)
