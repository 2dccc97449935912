# SPDX-License-Identifier: Apache-2.0
"""load_pipeline gives what diffusers' own from_pretrained gives, under one budget."""

import json
import warnings

import diffusers
import pytest
import torch

import distorch
from distorch.integrations import (
    distribute_pipeline,
    load_pipeline,
    pipeline_report,
    set_pipeline_loras,
    undistribute_pipeline,
)
from tests import tiny_models as tiny
from tests.integrations.pipelines import (
    DISK,
    MAKERS,
    PARTS,
    assert_same,
    draw,
    loras,
    models,
    resident,
    small,
)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, "float16", "auto", {"vae": torch.float32, "default": "bfloat16"}],
    ids=str,
)
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_as_diffusers_reads_it(folders, make, dtype):
    """Wan keeps some weights in float32, and Stable Diffusion's decoder may be asked to."""
    folder, _ = folders(make)
    pipe = load_pipeline(folder, dtype=dtype, **DISK)
    names = {"auto": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, dict):
        reference = resident(folder, {"vae": torch.float32, "default": torch.bfloat16})
    else:
        reference = resident(folder, names.get(dtype, dtype))
    assert type(pipe) is type(reference)
    assert_same(pipe, reference)
    report = pipeline_report(pipe)
    assert report.ok
    assert all(part.bytes["disk"] > part.bytes["cpu"] for part in report.parts.values())


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_same_picture(folders, make):
    folder, arguments = folders(make)
    wanted = draw(resident(folder), **arguments)
    pipe = load_pipeline(folder, "cpu,60kb;disk,*")
    assert torch.equal(draw(pipe, **arguments), wanted)
    distribute_pipeline(pipe, "cpu,20%;disk,80%")
    assert torch.equal(draw(pipe, **arguments), wanted)


# --- one budget ---


def test_one_budget_and_the_fast_place_for_what_runs_most(folders):
    folder, _ = folders(tiny.stable_diffusion)
    sizes = {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in models(resident(folder)).items()
    }
    budget = sizes["unet"] + 20_000
    pipe = load_pipeline(folder, f"cpu,{budget}b;disk,*")
    report = pipeline_report(pipe)
    assert report.ok
    assert report.bytes["cpu"] <= budget
    assert report.parts["unet"].bytes.get("disk", 0) < report.parts["vae"].bytes["disk"]
    assert report.bytes["cpu"] == sum(part.bytes["cpu"] for part in report.parts.values())
    text = str(report)
    assert "in all" in text
    assert "text_encoder" in text
    assert "<table>" in report._repr_html_() and "<svg" in report._repr_html_()
    words = {shape.text for shape in report.plot().shapes if hasattr(shape, "text")}
    assert {"unet", "vae", "text_encoder"} <= words
    assert json.loads(json.dumps(report.to_dict()))["ok"]


def test_a_log_has_no_bars(folders, capfd):
    from diffusers.utils import logging

    folder, _ = folders(tiny.stable_diffusion)
    told = []
    for progress in (None, False, told.append):
        load_pipeline(folder, "cpu,20kb;disk,*", progress=progress)
    assert capfd.readouterr().err == ""
    assert sum(told) > 0
    assert logging.is_progress_bar_enabled()  # as it was


def test_a_budget_that_cannot_hold_is_said(folders):
    folder, _ = folders(tiny.stable_diffusion)
    with pytest.warns(distorch.PlacementWarning, match="more than its share of 1000") as warned:
        pipe = load_pipeline(folder, "cpu,1000b;disk,*", min_bytes="1mb")
    assert warned[0].filename == __file__
    assert not pipeline_report(pipe).ok


def test_rules_name_parts(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(
        folder, "cpu,*;disk,10mb", min_bytes=0, rules=[("unet.*", "disk")], keep=["vae.*"],
        offload=["text_encoder.*.mlp.*"],
    )  # fmt: skip
    parts = pipeline_report(pipe).parts
    assert set(parts["unet"].bytes) == {"cpu", "disk"}
    assert parts["unet"].bytes["cpu"] == 0
    assert "disk" not in parts["vae"].bytes
    homes = parts["text_encoder"].placement
    assert {homes[name] for name in homes if ".mlp." in name} == {"disk"}
    with pytest.raises(distorch.PlacementError, match="matches no weight"):
        load_pipeline(folder, rules=[("unit.*", "disk")], **DISK)


def test_what_is_given_away_is_what_runs_least(folders):
    folder, _ = folders(tiny.stable_diffusion)
    size = sum(p.nbytes for p in resident(folder).text_encoder.parameters())
    pipe = load_pipeline(folder, virtual_vram=size // 2, donor="disk", compute="cpu", min_bytes=0)
    parts = pipeline_report(pipe).parts
    assert "disk" not in parts["unet"].bytes
    assert 0.8 * size // 2 < parts["text_encoder"].bytes["disk"] <= size // 2


# --- what diffusers' own methods do ---


@pytest.mark.parametrize(
    "call",
    [lambda p: p.enable_model_cpu_offload(), lambda p: p.enable_sequential_cpu_offload(),
     lambda p: p.enable_group_offload(onload_device=torch.device("cpu"))],
)  # fmt: skip
def test_other_ways_of_offloading_say_what_to_do(folders, call):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    with pytest.raises(distorch.PlacementError, match="Leave the call out.*distribute_pipeline"):
        call(pipe)
    assert pipeline_report(pipe).ok


def test_to(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    wanted = small(pipe)
    assert pipe.to("cpu") is pipe
    for device in ("meta", "cuda"):
        with pytest.raises(distorch.PlacementError, match="cannot move"):
            pipe.to(device)
    assert torch.equal(small(pipe), wanted)
    pipe.to(torch.float32)
    assert torch.equal(small(pipe), small(resident(folder).to(torch.float32)))
    assert pipeline_report(pipe).bytes["disk"] > 0


def test_tiling_callbacks_and_other_pipelines_of_the_same_parts(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe, plain = load_pipeline(folder, **DISK), resident(folder)
    seen = []
    for each in (pipe, plain):
        each.vae.enable_tiling()
        each.vae.enable_slicing()
        each.vae.tile_latent_min_size = 4
        options = {"callback_on_step_end": lambda p, i, t, kept: seen.append(i) or kept}
        each.picture = draw(each, height=32, width=32, num_images_per_prompt=2, **options)
    assert torch.equal(pipe.picture, plain.picture)
    assert seen == [0, 1, 0, 1]
    image = pipe.picture[:1]
    to_image = diffusers.StableDiffusionImg2ImgPipeline
    results = [
        draw(to_image.from_pipe(each, torch_dtype=torch.bfloat16), image=image, strength=1.0)
        for each in (pipe, plain)
    ]
    assert torch.equal(*results)
    assert distorch.is_sharded(pipe.unet.conv_in.weight)


def test_adapters_of_diffusers(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe, plain = load_pipeline(folder, **DISK), resident(folder)
    state, _ = loras(plain)
    pictures = []
    for each in (pipe, plain):
        each.load_lora_weights({k: v for k, v in state.items() if "_unet_" in k}, adapter_name="a")
        pictures.append(small(each))
        each.unload_lora_weights()
        pictures.append(small(each))
    assert torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[1], pictures[3])
    assert not torch.equal(pictures[0], pictures[1])


def test_pipelines_of_the_same_parts_know_where_they_are(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    state, places = loras(resident(folder))
    for other in (
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16),
        diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False),
    ):
        report = pipeline_report(other)
        assert report.ok
        assert report.bytes == pipeline_report(pipe).bytes
        with pytest.raises(distorch.PlacementError, match="Leave the call out"):
            other.enable_model_cpu_offload()
        set_pipeline_loras(other, [(state, 0.5)])
        assert "LoRA" in str(pipeline_report(pipe))
        set_pipeline_loras(other, [])


def test_compiled_and_plain_parts(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    wanted = pipeline_report(pipe).bytes
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert pipeline_report(pipe).bytes == wanted
    distorch.undistribute(pipe.vae)
    report = pipeline_report(pipe)
    assert report.ok
    assert report.plain["vae"]["cpu"] > 0
    assert "vae (not distributed)" in str(report)
    set_pipeline_loras(pipe, [])
    undistribute_pipeline(pipe)
    assert not any(distorch.is_sharded(p) for m in models(pipe).values() for p in m.parameters())
    with pytest.raises(distorch.PlacementError, match="is not distributed"):
        pipeline_report(pipe)
    assert "enable_model_cpu_offload" not in pipe.__dict__


def test_a_pipeline_that_accelerate_offloads(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = resident(folder)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(distorch.PlacementError, match=r"accelerate offloads.*remove_all_hooks\(\)"):
        distribute_pipeline(pipe, "cpu,0b;disk,*")
    with pytest.raises(distorch.PlacementError, match="accelerate offloads it"):
        distorch.distribute(pipe.unet, "cpu,0b;disk,*")


def test_adapters_of_both(folders):
    """A LoRA that diffusers has put on stays on top of ours: that is said."""
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    state, _ = loras(resident(folder))
    of_unet = {k: v for k, v in state.items() if "_unet_" in k}
    pipe.load_lora_weights(of_unet, adapter_name="mine")
    with pytest.warns(UserWarning, match=r"has adapters of PEFT \(mine\), which stay on"):
        set_pipeline_loras(pipe, [(of_unet, 1.0)])
    assert len(str(pipeline_report(pipe)).splitlines()) < 25
    pipe.unload_lora_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_pipeline_loras(pipe, [])


def test_a_new_placement_has_to_be_given(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, **DISK)
    with pytest.raises(distorch.SpecError, match="give a placement"):
        distribute_pipeline(pipe, keep=["vae.*"])
    assert pipeline_report(pipe).parts["vae"].bytes["disk"] > 0


def test_saving(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    load_pipeline(folder, **DISK).save_pretrained(tmp_path / "saved")
    assert_same(resident(tmp_path / "saved"), resident(folder))


def test_a_pipeline_that_exists(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = resident(folder)
    wanted = small(pipe)
    with pytest.raises(
        distorch.PlacementError, match="is not distributed: load it with load_pipeline"
    ):
        pipeline_report(pipe)
    assert distribute_pipeline(pipe, "cpu,0b;disk,*", min_bytes=0, keep=["vae.*"]) is pipe
    assert pipeline_report(pipe).parts["vae"].bytes["cpu"] > 0
    assert torch.equal(small(pipe), wanted)
    distribute_pipeline(pipe, "cpu,40kb;disk,*")  # min_bytes and keep stay as they were
    report = pipeline_report(pipe)
    assert set(report.parts["vae"].bytes) == {"cpu"}
    for part in PARTS:
        distorch.undistribute(getattr(pipe, part))
    assert torch.equal(small(pipe), wanted)


@pytest.mark.parametrize("distributed", [False, True])
def test_an_error_half_way_puts_all_parts_back(folders, monkeypatch, distributed):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = (
        load_pipeline(folder, "cpu,40kb;disk,*", min_bytes=0) if distributed else resident(folder)
    )
    wanted = small(pipe)
    before = pipeline_report(pipe).bytes if distributed else None
    from distorch.integrations import pipeline

    real, calls = pipeline.api.distribute, []

    def fails(module, *args, **options):
        calls.append(module)
        if len(calls) == 3:
            raise distorch.FetchError("the donor is gone")
        return real(module, *args, **options)

    monkeypatch.setattr(pipeline.api, "distribute", fails)
    with pytest.raises(distorch.FetchError, match="the donor is gone"):
        distribute_pipeline(pipe, "cpu,10kb;disk,*", min_bytes=0)
    assert len(calls) >= 3
    if distributed:
        assert pipeline_report(pipe).ok
        assert pipeline_report(pipe).bytes == before
    else:
        sharded = [distorch.is_sharded(p) for m in models(pipe).values() for p in m.parameters()]
        assert not any(sharded)
    assert torch.equal(small(pipe), wanted)
