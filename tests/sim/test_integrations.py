# SPDX-License-Identifier: Apache-2.0
"""Pipelines on an accelerator that holds less than one of their parts."""

import pytest
import torch

import distorch
from distorch.integrations import distribute_pipeline, load_pipeline, pipeline_report
from distorch.testing import sim
from tests import tiny_models as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tiny.stable_diffusion, tmp_path_factory.mktemp("sd"))[0]


def results(pipe):
    """What each part makes of the same inputs. (The simulated device has no part in scheduling.)"""
    device = pipe.unet.device
    ids = torch.arange(8, device=device)[None]
    latents = torch.linspace(-1, 1, 256, dtype=torch.bfloat16).view(1, 4, 8, 8).to(device)
    with torch.inference_mode():
        words = pipe.text_encoder(ids)[0]
        noise = pipe.unet(latents, torch.tensor([7], device=device), words).sample
        return [words.cpu(), noise.cpu(), pipe.vae.decode(latents).sample.cpu()]


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def computes(pipe):
    return {str(part.compute) for part in pipeline_report(pipe).parts.values()}


@pytest.mark.parametrize(
    "how",
    [{"spec": "sim:0,50kb;cpu,*"}, {"spec": "sim:0,0b;disk,*"},
     {"virtual_vram": "180kb", "donor": "cpu", "compute": "sim:0"}],
    ids=str,
)  # fmt: skip
def test_a_part_larger_than_the_device(folder, how):
    sim.configure(memory="125kb")
    pipe = load_pipeline(folder, min_bytes=0, **how)
    report = pipeline_report(pipe)
    assert report.ok
    assert computes(pipe) == {"sim:0"}
    assert sum(report.parts["unet"].bytes.values()) > 125 << 10
    assert report.bytes["sim:0"] < 125 << 10


def test_the_same_bits_and_the_same_device(folder):
    sim.configure(devices=2)
    plain = load_pipeline(folder, "sim:0,*")
    wanted = results(plain)
    pipe = load_pipeline(folder, "sim:0,60kb;cpu,*", min_bytes=0)
    assert same(results(pipe), wanted)
    for spec in ("cpu,*", "disk,*;cpu,50kb"):  # it goes on computing where it does
        distribute_pipeline(pipe, spec)
        assert computes(pipe) == {"sim:0"}
        assert same(results(pipe), wanted)
    distribute_pipeline(pipe, virtual_vram="100kb")
    assert computes(pipe) == {"sim:0"}
    assert pipeline_report(pipe).bytes["cpu"] <= 100 << 10
    distribute_pipeline(pipe, "cpu,*", compute="cpu")
    assert computes(pipe) == {"cpu"}


def test_pipe_to(folder):
    sim.configure()
    pipe = load_pipeline(folder, "sim:0,60kb;cpu,*")
    assert pipe.to("sim:0") is pipe
    with pytest.raises(distorch.PlacementError, match="cannot move"):
        pipe.to("cpu")
    assert pipeline_report(pipe).ok


def test_what_no_entry_names_goes_to_ram_before_the_disk(folder):
    sim.configure()
    pipe = load_pipeline(folder, "sim:0,60kb;disk,40kb", min_bytes=0)
    parts = pipeline_report(pipe).parts
    assert "disk" not in parts["unet"].bytes
    assert parts["text_encoder"].bytes["disk"] > 0
