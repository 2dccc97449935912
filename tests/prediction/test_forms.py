# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured: weights in other forms, and models inside of programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import distorch
from tests.gguf_files import write_blocks
from tests.prediction.programs import (
    ALL_AWAY,
    CPU,
    DTYPE,
    RATE,
    chain,
    check,
    configure,
    inference,
    record,
    resident,
    there,
)


def _fp8(path: Any, layers: int, width: int) -> None:
    state: dict[str, Tensor] = {}
    for i in range(layers):
        state[f"{i}.weight"] = torch.randn(width, width).to(torch.float8_e4m3fn)
        state[f"{i}.weight_scale"] = torch.tensor(0.5)
    save_file(state, path)


@pytest.mark.parametrize("spec", [ALL_AWAY, "sim:0,50%;cpu,*", "sim:0,20%;disk,*"])
@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_narrow_weights(tmp_path, kind, spec):
    """FLUX as Q8_0 or fp8: half of the bytes travel, the ring holds them and the wide ones, and
    each use has to widen them, also that of a weight that never leaves the card.
    """
    configure(mode="eager", flops=5e11, memory_bandwidth=20e9, disk=(3e9, 80e-6))
    path = tmp_path / ("m.gguf" if kind == "gguf" else "m.safetensors")
    (write_blocks if kind == "gguf" else _fp8)(path, 8, 512)
    module = nn.Sequential(*(nn.Linear(512, 512, bias=False, dtype=DTYPE) for _ in range(8)))
    distorch.load(module, path, "sim:0,*", min_bytes=0)
    x = torch.zeros(32, 512, dtype=DTYPE).to("sim:0")
    # Two reads share a disk. How much of their latencies overlap depends on when both began.
    within = 0.04 if "disk" in spec else 0.02
    check(module, inference(module, x), spec, within=within, prefetch="2mb", min_bytes=0)


@pytest.mark.parametrize("tokens", [256, 8192])
def test_loras(tokens):
    """Styles on half of the layers, added at each fetch: they cost computing and no bytes."""
    configure(memory_bandwidth=200e9)
    module = resident(chain(12))
    rank = 64
    style = {}
    for i in range(0, 12, 2):
        style[f"{i}.lora_up.weight"] = torch.zeros(2048, rank)
        style[f"{i}.lora_down.weight"] = torch.zeros(rank, 2048)
    distorch.redistribute(module, ALL_AWAY, prefetch="40mb", min_bytes=0)
    run = inference(module, there(tokens, 2048))
    distorch.calibrate(progress=False)
    run()
    options = {"prefetch": "24mb", "min_bytes": 0}
    bare = distorch.predict(module, record(module, run), "sim:0,10%;cpu,*", **options)
    distorch.set_loras(module, [(style, 1.0)], lora_mode="fetch")
    patched, _ = check(module, run, "sim:0,10%;cpu,*", **options)
    assert patched.seconds >= 0.98 * bare.seconds
    assert patched.links[CPU].bytes == pytest.approx(bare.links[CPU].bytes, rel=0.02)


def test_weight_norm():
    """HiFi-GAN, BigVGAN, Encodec: `weight_norm` makes each weight of two parameters, of which one
    is a vector; the operator that wants the bytes is not the convolution.
    """

    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = lambda: nn.Conv1d(512, 512, 7, padding=3, dtype=DTYPE, device="meta")  # noqa: E731
            self.layers = nn.ModuleList(parametrizations.weight_norm(make()) for _ in range(10))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(F.leaky_relu(x))
            return x

    module = resident(Vocoder())
    check(
        module, inference(module, there(1, 512, 8192)), "sim:0,20%;cpu,*",
        prefetch="9mb", min_bytes=0,
    )  # fmt: skip


class Adapted(nn.Module):
    """A frozen base, checkpointed or not, with a small trained scale after each layer."""

    def __init__(self, base: nn.Sequential, again: bool) -> None:
        super().__init__()
        self.base, self.again = base.requires_grad_(False), again
        self.scales = nn.ParameterList(
            nn.Parameter(torch.empty(1024, dtype=DTYPE, device="meta")) for _ in base
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.base, self.scales, strict=True):
            run = lambda x, layer=layer, scale=scale: F.gelu(layer(x) * scale)  # noqa: E731
            x = (
                checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
                if self.again
                else run(x)
            )
        return x


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("prefetch", ["6mb", "13mb"])
def test_training_of_an_adapter(prefetch, again):
    """QLoRA-like training: the way back uses the weights in reverse, the last ones at once. With
    checkpoints each layer runs once more on the way back.
    """
    module = resident(Adapted(chain(12, 1024), again))
    x = there(4096, 1024)

    def step() -> None:
        module(x).square().mean().backward()
        module.zero_grad(set_to_none=True)

    check(module, step, "sim:0,20%;cpu,*", prefetch=prefetch, min_bytes=0)


def test_full_fine_tuning_in_place():
    """Gradients of weights that lie in RAM are made on the card; every weight but the first is
    brought twice in a step.
    """
    module = resident(chain(8, 1024))
    x = there(4096, 1024)

    def step() -> None:
        module(x).square().mean().backward()
        module.zero_grad(set_to_none=True)

    check(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0)


def test_a_model_inside_of_a_program():
    """A sampler that calls the placed model and computes much of its own (a preview, a VAE that is
    not placed, guidance): copies for the next pass run meanwhile. The outer module is not placed.
    """

    class Sampler(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            y = self.inner(torch.cat([x, x]))
            for _ in range(12):
                y = y @ w  # nobody's weight
            return y

    inner = resident(chain(8))
    outer, x, w = Sampler(nn.Sequential(inner)), there(512, 2048), there(2048, 2048)
    check(inner, inference(outer, x, w), "sim:0,25%;cpu,*", prefetch="16mb", min_bytes=0)


def test_recorded_while_starved():
    """A user with a small card records where everything is slow, and asks what a larger card would
    give. Waiting is no computing.
    """
    module = distorch.distribute(chain(12), ALL_AWAY, prefetch=0, min_bytes=0)
    run = inference(module, there(2048, 2048))
    prediction, _ = check(module, run, "sim:0,*", min_bytes=0)
    assert prediction.binds == "compute" and not any(prediction.stalls.values())
    assert prediction.seconds == pytest.approx(prediction.compute_seconds, rel=0.02)
    assert all(link.bytes == 0 for link in prediction.links.values())
    check(module, run, "sim:0,50%;cpu,*", prefetch="32mb", order="sequential", min_bytes=0)


def test_rules_orders_and_names():
    """device_map-like rules: the middle of the model is away, the ends are not, so that copies for
    the next step run over both ends.
    """
    module = resident(chain(16))
    run = inference(module, there(4096, 2048))
    rules = [(f"{i}.weight", "cpu") for i in range(5, 11)] + [("*", "sim:0")]
    prediction, _ = check(module, run, "sim:0,70%;cpu,*", rules=rules, prefetch="16mb")
    waited = {name for name, seconds in prediction.stalls.items() if seconds > 1e-5}
    assert waited <= {f"{i}.weight" for i in range(5, 11)}
    weight = module[0].weight.nbytes
    assert prediction.links[CPU].bytes == pytest.approx(6 * weight, rel=0.02)
    assert prediction.links[CPU].busy_seconds == pytest.approx(6 * weight / RATE, rel=0.02)
