# SPDX-License-Identifier: Apache-2.0
"""What people do with a model. Every check runs on the resident model and on a distributed one.

A check gives back evidence (see `evidence`); the same check on a resident module says what it
must be. What the resident module cannot do is not applicable.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import evidence
from .systems import System

Check = Callable[["Subject"], Any]
CHECKS: dict[str, Check] = {}

_LORA_LAYERS = 6
_PRINTED = 3


class CannotDoError(Exception):
    """The architecture has no such thing: said by a check of the resident module."""


@dataclass
class Built:
    """A tiny model with random weights and the arguments of one forward."""

    module: nn.Module
    inputs: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()

    def __call__(self, module: nn.Module) -> Any:
        return module(*copy.deepcopy(self.arguments), **copy.deepcopy(self.inputs))


@dataclass
class Subject:
    """One architecture under one system."""

    built: Built
    system: System

    def plain(self) -> nn.Module:
        """A copy of the model with all its weights at home."""
        return copy.deepcopy(self.built.module)

    def distributed(self) -> nn.Module:
        return self.system.distribute(self.plain())

    def output(self, module: nn.Module) -> Any:
        seed()
        return self.built(module)

    def forward(self, module: nn.Module) -> Any:
        """Evidence of one forward without gradients."""
        with torch.no_grad():
            return evidence.of(self.output(module))

    def loss(self, module: nn.Module) -> torch.Tensor:
        """A number that depends on everything that the model gives out."""
        outputs = evidence.tensors(self.output(module))
        parts = [t.float().square().mean() for t in outputs if t.requires_grad]
        if not parts:
            raise CannotDoError("no output has a gradient")
        return torch.stack(parts).sum()

    def backward(self, module: nn.Module) -> Any:
        """Evidence of one forward and backward."""
        module.zero_grad(set_to_none=True)
        loss = self.loss(module)
        loss.backward()
        return [loss.detach().clone(), evidence.gradients(module)]


def seed(number: int = 3) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@_check
def forward(subject: Subject) -> Any:
    return subject.forward(subject.distributed())


@_check
def repeat(subject: Subject) -> Any:
    module = subject.distributed()
    return [subject.forward(module) for _ in range(4)]


@_check
def generate(subject: Subject) -> Any:
    module: Any = subject.distributed()
    if not getattr(module, "can_generate", lambda: False)():
        raise CannotDoError("the model does not generate")
    inputs = {k: v for k, v in subject.built.inputs.items() if not k.startswith("decoder_")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    seed()
    return evidence.of(module.generate(**copy.deepcopy(inputs), **options))


@_check
def backward(subject: Subject) -> Any:
    module = subject.distributed()
    return [subject.backward(module) for _ in range(2)]


def _with_lora(module: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    if not layers:
        layers = [name for name, part in module.named_modules() if type(part) is nn.Conv2d]
    if not layers:
        raise CannotDoError("no layer that takes an adapter")
    seed(5)
    chosen = layers[:: max(1, len(layers) // _LORA_LAYERS)]
    config = LoraConfig(r=2, target_modules=chosen, init_lora_weights=False)
    return get_peft_model(module, config)  # type: ignore[arg-type]


def _lora(subject: Subject, model: Any) -> list[Any]:
    """An adapter is run, trained for two steps, and merged."""
    found = [subject.forward(model), subject.backward(model)]
    found.append(_train(subject, model, torch.optim.AdamW, steps=2))
    merged = model.merge_and_unload()
    return [*found, subject.forward(merged), evidence.weights(merged)]


@_check
def lora_over(subject: Subject) -> Any:
    return _lora(subject, _with_lora(subject.distributed()))


@_check
def lora_under(subject: Subject) -> Any:
    return _lora(subject, subject.system.distribute(_with_lora(subject.plain())))


@_check
def state_dict(subject: Subject) -> Any:
    module = subject.distributed()
    return [evidence.of(module.state_dict()), subject.forward(module)]


def _other_values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor * 0.5 + 0.01 if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }


@_check
def load_state_dict(subject: Subject) -> Any:
    module, values = subject.distributed(), _other_values(subject.plain())
    result = module.load_state_dict(values)
    found = [sorted(result.missing_keys), sorted(result.unexpected_keys)]
    return [found, subject.forward(module), evidence.of(module.state_dict())]


@_check
def load_state_dict_assign(subject: Subject) -> Any:
    module, values = subject.distributed(), _other_values(subject.plain())
    module.load_state_dict(values, assign=True)
    return [subject.forward(module), evidence.of(module.state_dict())]


@_check
def deepcopy(subject: Subject) -> Any:
    module = subject.distributed()
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.5)
    return [subject.forward(copied), evidence.weights(copied), evidence.weights(module)]


@_check
def save_pretrained(subject: Subject) -> Any:
    from safetensors.torch import load_file

    module: Any = subject.distributed()
    if not hasattr(module, "save_pretrained"):
        raise CannotDoError("the model has no save_pretrained")
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        saved = {file.name: load_file(file) for file in files}
        loaded = type(module).from_pretrained(folder).eval()
        return [saved, subject.forward(loaded), subject.forward(module)]


@_check
def torch_save(subject: Subject) -> Any:
    module, buffer = subject.distributed(), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    return evidence.of(torch.load(buffer, weights_only=True))


@_check
def inference_mode(subject: Subject) -> Any:
    module = subject.distributed()
    with torch.inference_mode():
        inside = evidence.of(subject.output(module))
    return [inside, subject.forward(module)]


@_check
def autocast(subject: Subject) -> Any:
    module = subject.distributed()
    with torch.autocast("cpu", torch.bfloat16):
        found = subject.forward(module)
    with torch.autocast("cpu", torch.bfloat16):  # the first one's casts have no gradient
        return [found, subject.backward(module)]


@_check
def introspection(subject: Subject) -> Any:
    module = subject.distributed()
    found: list[Any] = [repr(module), sum(p.numel() for p in module.parameters())]
    named = [(name, p) for name, p in module.named_parameters() if p.numel()]
    for name, parameter in named[:_PRINTED]:
        values = parameter.detach()
        found += [name, type(parameter).__name__, tuple(parameter.shape), str(parameter.dtype)]
        found += [str(parameter.device), parameter.requires_grad, parameter.stride()]
        found += [repr(parameter), f"{values}", parameter.tolist(), len(parameter.shape)]
        found += [values.numpy().tobytes(), np.asarray(values).sum().item()]
        found += [values.flatten()[0].item(), float(values.flatten()[-1])]
        found += [float(values.norm()), bool((values == values.clone()).all())]
        found += [[row.tolist() for row in values][:2]] if values.dim() else []
    return found


@_check
def in_place(subject: Subject) -> Any:
    module = subject.distributed()
    seed(7)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            if not parameter.is_floating_point():
                continue
            parameter.mul_(0.75).add_(0.01)
            if index % 4 == 0:
                nn.init.normal_(parameter, std=0.02)
            elif index % 4 == 1:
                parameter.copy_(parameter * 0.5)
            elif index % 4 == 2:
                parameter.data[..., :1] = 0.125
            else:
                parameter.data = parameter.data * 2
    return [subject.forward(module), evidence.weights(module)]


@_check
def functional_call(subject: Subject) -> Any:
    module = subject.distributed()
    every = dict(module.named_parameters())
    other = {n: p.detach() * 0.5 for n, p in list(every.items())[::2] if p.is_floating_point()}
    found = []
    for values in (every, other):
        with torch.no_grad():
            seed()
            inputs = copy.deepcopy(subject.built.inputs)
            output = torch.func.functional_call(module, values, subject.built.arguments, inputs)
            found.append(evidence.of(output))
    return [*found, subject.forward(module)]


def _train(subject: Subject, module: nn.Module, kind: Any, steps: int = 3, **options: Any) -> Any:
    module.train()
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = kind(trainable, lr=1e-3, **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = subject.loss(module)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    module.eval()
    return [losses, evidence.weights(module)]


@_check
def train_sgd(subject: Subject) -> Any:
    module = subject.distributed()
    return _train(subject, module, torch.optim.SGD, momentum=0.9)


@_check
def train_adamw(subject: Subject) -> Any:
    return _train(subject, subject.distributed(), torch.optim.AdamW)


@_check
def gradient_checkpointing(subject: Subject) -> Any:
    module: Any = subject.distributed()
    module.train()
    if getattr(module, "supports_gradient_checkpointing", False):
        module.gradient_checkpointing_enable()
    elif getattr(module, "_supports_gradient_checkpointing", False):
        module.enable_gradient_checkpointing()
    else:  # the whole model is recomputed
        built = subject.built
        rerun = Built(module, built.inputs, built.arguments)

        def recomputed(anchor: nn.Module) -> Any:
            return checkpoint(lambda: rerun(anchor), use_reentrant=False)

        return _Recomputed(rerun, recomputed, subject.system).backward(module)
    return subject.backward(module)


class _Recomputed(Subject):
    """A subject whose forward is wrapped."""

    def __init__(self, built: Built, run: Callable[[nn.Module], Any], system: System) -> None:
        super().__init__(built, system)
        self.run = run

    def output(self, module: nn.Module) -> Any:
        seed()
        return self.run(module)


def _cast(subject: Subject, convert: Callable[[nn.Module], Any], dtype: torch.dtype) -> Any:
    module = subject.distributed()
    convert(module)
    built = subject.built
    low = Built(module, _as(built.inputs, dtype), _as(built.arguments, dtype))
    return [evidence.weights(module), Subject(low, subject.system).forward(module)]


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _as(part, dtype) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as(part, dtype) for part in value)
    return value


@_check
def cast_half(subject: Subject) -> Any:
    return _cast(subject, lambda module: module.half(), torch.float16)


@_check
def cast_bfloat16(subject: Subject) -> Any:
    return _cast(subject, lambda module: module.bfloat16(), torch.bfloat16)


@_check
def cast_to(subject: Subject) -> Any:
    return _cast(subject, lambda module: module.to("cpu", torch.float64), torch.float64)


@_check
def pickled(subject: Subject) -> Any:
    module = subject.distributed()
    loaded = pickle.loads(pickle.dumps(module))
    return [subject.forward(loaded), evidence.weights(loaded), subject.backward(loaded)]


@_check
def unwrap(subject: Subject) -> Any:
    module = subject.distributed()
    ran = subject.forward(module)
    module = subject.system.undo(module)
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules()]
    kinds = [type(p).__name__ for p in module.parameters()]
    addresses = [p.data_ptr() != 0 for p in module.parameters() if p.numel()]
    facts = [hooks, kinds, addresses, evidence.weights(module)]
    return [ran, *facts, subject.forward(module), subject.backward(module)]


@_check
def redistributed(subject: Subject) -> Any:
    module = subject.distributed()
    found = [subject.forward(module)]
    for turn in (1, 2):
        module = subject.system.redistribute(module, turn)
        found += [subject.forward(module), subject.backward(module)]
    return found
