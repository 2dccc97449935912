# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured: weights of all sizes, rings of all sizes, and all ways to bring bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import distorch
from tests.prediction.programs import (
    ALL_AWAY,
    CPU,
    DTYPE,
    LATENCY,
    RATE,
    Albert,
    chain,
    check,
    configure,
    inference,
    linear,
    resident,
    there,
)


class Norms(nn.Module):
    """Blocks of one matrix and many vectors."""

    def __init__(self, blocks: int = 6, width: int = 512, small: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                linear(width, width, True),
                *(nn.LayerNorm(width, dtype=DTYPE, device="meta") for _ in range(small)),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("tokens", [16384, 16])
@pytest.mark.parametrize("prefetch", ["1mb", "4mb"])
def test_many_small_norms(prefetch, tokens):
    """ConvNeXt, ViT, Wav2Vec2 with min_bytes=0: 80 vectors of 1 KiB. A latency of 10 us for each
    would be most of the time; neighbours travel together, so it is far less. With 16 tokens the host, which
    takes microseconds for every operator, is slower than the device.
    """
    module = resident(Norms())
    check(module, inference(module, there(tokens, 512)), ALL_AWAY, prefetch=prefetch, min_bytes=0)


class Lopsided(nn.Module):
    """A giant between small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = chain(8, 1024), chain(8, 1024)
        self.giant = linear(1024, 65536)
        self.back = linear(1024, 1024)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = self.giant(x[:8]).view(8, 64, 1024).sum(1).mean(0) + x
        return self.after(self.back(x))


@pytest.mark.parametrize("prefetch", ["auto", "4mb", 0])
def test_a_giant_between_dwarfs(prefetch):
    """A projection of a vision tower, a head of 150,000 words: 128 MiB next to 2 MiB. Where it
    does not fit into the ring, it is fetched when it is asked for, and everybody waits for it.
    """
    module = resident(Lopsided())
    run = inference(module, there(4096, 1024))
    prediction, _ = check(module, run, ALL_AWAY, prefetch=prefetch, min_bytes=0)
    if prefetch == "4mb":
        assert max(prediction.stalls, key=prediction.stalls.get) == "giant.weight"
        giant = module.giant.weight.nbytes / RATE
        assert prediction.stalls["giant.weight"] == pytest.approx(giant, rel=0.1)
    if prefetch == 0:
        assert prediction.binds != "compute"


@pytest.mark.parametrize("short", [0, 1])
def test_a_ring_that_holds_everything_or_nearly(short):
    """A user raises `prefetch` until nothing travels any more. One weight short of it, least
    recently used would move all weights in every step, and a better choice only a few.
    """
    module = resident(chain(12))
    weight = module[0].weight.nbytes
    ring = (12 - short) * (weight + 2 * 4096)
    prediction, found = check(
        module, inference(module, there(256, 2048)), ALL_AWAY, prefetch=ring, min_bytes=0
    )
    if not short:
        moved = prediction.links[CPU].bytes if CPU in prediction.links else 0
        assert moved == 0 and prediction.binds == "compute"
        assert prediction.seconds == pytest.approx(prediction.compute_seconds, rel=0.02)
        assert not found.bytes


def test_another_model_made_the_ring_larger():
    """A text encoder and a transformer in one process: models on one device share a ring, and the
    largest `prefetch` counts. The second model's own 8 MiB are not what it gets.
    """
    encoder = distorch.distribute(chain(4), ALL_AWAY, prefetch="32mb", min_bytes=0)
    module = resident(Albert())
    check(module, inference(module, there(1024, 1024)), ALL_AWAY, prefetch="8mb", min_bytes=0)
    assert distorch.report(encoder).ok


PEER = {("sim:1", "sim:0"): (20e9, 5e-6)}


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "one root port"])
@pytest.mark.parametrize(
    "spec",
    ["sim:0,10%;cpu,30%;sim:1,*", "sim:0,0b;cpu+sim:1,*", "sim:0,20%;cpu+sim:1,40%;cpu,*"],
)
def test_two_donors(spec, shared):
    """RAM and a second card. Where both hang on one root port, each link alone carries what it
    does in a table, and both at once do not.
    """
    groups = [[("cpu", "sim:0"), ("sim:1", "sim:0")]] if shared else []
    configure(devices=2, links=PEER, shared=groups, rate=16e9)
    module = resident(chain(16))
    check(module, inference(module, there(768, 2048)), spec, prefetch="24mb", min_bytes=0)


def test_a_second_card_without_peer_access():
    """Consumer cards: bytes go down one link and up the other, which RAM's weights use, too."""
    links = {("sim:1", "cpu"): (12e9, LATENCY)}
    configure(devices=2, links=links)
    module = resident(chain(16))
    # The way from one device to the other counts as one link, as in `stats` and `calibrate`.
    check(
        module, inference(module, there(2048, 2048)), "sim:0,10%;cpu,40%;sim:1,*", others=True,
        prefetch="32mb", min_bytes=0,
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["sim:0,0b;disk,*", "sim:0,20%;cpu,40%;disk,*"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_disk(spec, tokens):
    """DeepSpeed ZeRO-Inference and FlexGen with NVMe: a byte is read, and then copied over the
    link that other weights use. Two reads at a time share the disk, and each has its latency.
    """
    configure(mode="eager", flops=1e11, disk=(3e9, 80e-6))
    module = resident(
        nn.Sequential(*(nn.Linear(512, 512, bias=False, dtype=DTYPE) for _ in range(16)))
    )
    x = torch.zeros(tokens, 512, dtype=DTYPE).to("sim:0")
    prediction, _ = check(module, inference(module, x), spec, prefetch="2mb", min_bytes=0)
    if tokens == 1 and spec.startswith("sim:0,0b"):
        assert prediction.binds == "disk"


def test_an_upload_in_every_step():
    """A video model that takes a new frame from RAM in each step (or a cache of keys that lives
    there): the user's own copy shares the link with the weights.
    """
    module = resident(chain(12))
    frames = torch.empty(8192, 2048, dtype=DTYPE, device="cpu")
    x = there(2048, 2048)

    def step() -> Tensor:
        with torch.no_grad():
            frame = frames.to("sim:0")
            return module(x) + frame[:2048]

    check(module, step, "sim:0,25%;cpu,*", others=True, prefetch="24mb", min_bytes=0)
