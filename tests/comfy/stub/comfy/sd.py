# SPDX-License-Identifier: Apache-2.0
"""Loaders' results: a text encoder and a VAE around a patcher."""

import torch

from comfy.model_patcher import ModelPatcher
from comfy.ops import manual_cast, mixed_precision
from comfy.quant_ops import QuantizedTensor


class CLIPType:
    STABLE_DIFFUSION = 1


class Block(torch.nn.Module):
    def __init__(self, operations=manual_cast, width=64):
        super().__init__()
        self.up = operations.Linear(width, 4 * width)
        self.down = operations.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(torch.nn.Module):
    """Three blocks and a buffer, as a diffusion model would be."""

    manual_cast_dtype = None

    def __init__(self, operations=manual_cast, seed=0):
        super().__init__()
        self.diffusion_model = torch.nn.Sequential(*(Block(operations) for _ in range(3)))
        self.register_buffer("sigmas", torch.linspace(0, 1, 8))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

    def get_dtype(self):
        return torch.float32

    def forward(self, x):
        return self.diffusion_model(x) * self.sigmas[-1].to(x.device)


def patcher(seed=0):
    cpu = torch.device("cpu")
    with torch.inference_mode():
        return ModelPatcher(Model(seed=seed), cpu, cpu)


def dynamic_patcher(kind, seed=0):
    """As a file of bfloat16 weights is loaded by dynamic VRAM, one of which it lacks."""
    cpu = torch.device("cpu")

    def load(disable_dynamic=False):
        with torch.inference_mode():
            model = Model(seed=seed)
            for layer in model.modules():
                for name, parameter in list(layer._parameters.items()):
                    setattr(layer, f"{name}_comfy_model_dtype", parameter.dtype)
                    parameter.data = parameter.data.bfloat16()
            layer = model.diffusion_model[2].up
            layer.bias = torch.nn.Parameter(layer.bias.to("meta"), requires_grad=False)
        return (ModelPatcher if disable_dynamic else kind)(model, cpu, cpu)

    made = load()
    made.cached_patcher_init = (load, ())
    return made


def quantised_patcher(seed=0):
    cpu = torch.device("cpu")
    with torch.inference_mode():
        model = Model(mixed_precision, seed)
        for block in model.diffusion_model:
            for layer in (block.up, block.down):
                weight = QuantizedTensor.from_float(layer.weight.detach())
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return ModelPatcher(model, cpu, cpu)


class CLIP:
    def __init__(self):
        self.patcher = patcher(1)
        self.cond_stage_model = self.patcher.model


class VAE:
    def __init__(self):
        self.patcher, self.device = patcher(2), torch.device("cpu")
        self.first_stage_model = self.patcher.model


def load_diffusion_model_state_dict(state, model_options=None, disable_dynamic=False):
    if "diffusion_model.0.up.weight" not in state:
        return None
    model = Model(model_options["custom_operations"])
    model.load_state_dict(state, strict=False)
    cpu = torch.device("cpu")
    return ModelPatcher(model, cpu, cpu)


def load_text_encoder_state_dicts(state_dicts, clip_type, **_):
    raise NotImplementedError
