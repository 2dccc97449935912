# SPDX-License-Identifier: Apache-2.0
"""LoRAs on the parts of a pipeline: each where its keys say, all parts or none."""

import pytest
import torch
from safetensors.torch import save_file

import distorch
from distorch.integrations import (
    distribute_pipeline,
    load_pipeline,
    set_pipeline_loras,
)
from tests import tiny_models as tiny
from tests.integrations.pipelines import (
    DISK,
    PARTS,
    loras,
    resident,
)


def test_loras_go_to_the_parts_that_they_name(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    plain = resident(folder)
    state, places = loras(plain)
    save_file(state, tmp_path / "style.safetensors")
    pipe = load_pipeline(folder, loras=[(tmp_path / "style.safetensors", 0.5)], **DISK)

    def changed():
        return {
            part: [
                name for name, value in getattr(plain, part).state_dict().items()
                if not torch.equal(getattr(pipe, part).state_dict()[name], value)
            ]
            for part in PARTS
        }  # fmt: skip

    assert changed() == {**{part: [name] for part, name in places.items()}, "vae": []}
    half = pipe.unet.state_dict()[places["unet"]].clone()
    set_pipeline_loras(pipe, [(tmp_path / "style.safetensors", 1.0)])
    assert not torch.equal(pipe.unet.state_dict()[places["unet"]], half)
    set_pipeline_loras(pipe, [(tmp_path / "style.safetensors", 0.5)])
    assert torch.equal(pipe.unet.state_dict()[places["unet"]], half)
    distribute_pipeline(pipe, "cpu,50%;disk,50%")
    assert torch.equal(pipe.unet.state_dict()[places["unet"]], half)
    set_pipeline_loras(pipe, [])
    assert not any(changed().values())


def test_loras_that_fit_nothing(folders):
    folder, _ = folders(tiny.stable_diffusion)
    state, places = loras(resident(folder))
    of_second = {k.replace("lora_te_", "lora_te2_"): v for k, v in state.items()}
    with pytest.raises(distorch.FormatError, match="keys for 'text_encoder_2'.*strict_loras=False"):
        load_pipeline(folder, loras=[(of_second, 1.0)], **DISK)
    unknown = {**state, "lora_unet_nowhere.lora_down.weight": torch.zeros(2, 8),
               "lora_unet_nowhere.lora_up.weight": torch.zeros(8, 2)}  # fmt: skip
    pipe = load_pipeline(folder, loras=[(state, 1.0)], **DISK)
    before = {part: getattr(pipe, part).state_dict()[name].clone() for part, name in places.items()}
    with pytest.raises(distorch.FormatError, match="fit no weight"):
        set_pipeline_loras(pipe, [(unknown, 0.3)])
    for part, name in places.items():
        assert torch.equal(getattr(pipe, part).state_dict()[name], before[part])
    with pytest.raises(distorch.SpecError, match="there is no part 'transformer'"):
        set_pipeline_loras(pipe, [(state, 1.0, "transformer")])
    with pytest.raises(distorch.SpecError, match="expected .file or state dict, strength"):
        set_pipeline_loras(pipe, [state])


def test_a_failure_in_one_part_puts_all_loras_back(folders, tmp_path, monkeypatch):
    """With the mode that each part had; LoRAs that were put on a part alone count, too."""
    folder, _ = folders(tiny.stable_diffusion)
    state, places = loras(resident(folder))
    pipe = load_pipeline(folder, **DISK)
    distorch.set_loras(pipe.text_encoder, [({k: v for k, v in state.items() if "_te_" in k}, 0.7)])
    before = {part: getattr(pipe, part).state_dict()[name].clone() for part, name in places.items()}
    from distorch.integrations import pipeline

    real, calls = pipeline.set_loras, []

    def fails(module, *args, **options):
        calls.append(module)
        if module is pipe.unet:
            raise KeyboardInterrupt
        return real(module, *args, **options)

    monkeypatch.setattr(pipeline, "set_loras", fails)
    with pytest.raises(KeyboardInterrupt):
        set_pipeline_loras(pipe, [(state, 0.2)], lora_mode="fetch")
    assert pipe.text_encoder in calls
    for part, name in places.items():
        assert torch.equal(getattr(pipe, part).state_dict()[name], before[part])
    known = pipe.text_encoder.__dict__["_distorch"].patching
    assert known.options.mode == "merge"
    monkeypatch.setattr(pipeline, "set_loras", real)
    set_pipeline_loras(pipe, [])
    assert distorch.report(pipe.text_encoder).loras == []
    plain = resident(folder).text_encoder.state_dict()[places["text_encoder"]]
    assert torch.equal(pipe.text_encoder.state_dict()[places["text_encoder"]], plain)


def test_strict_is_asked_each_time(folders):
    folder, _ = folders(tiny.stable_diffusion)
    state, _ = loras(resident(folder))
    more = {**state, "lora_te2_x.lora_down.weight": torch.zeros(2, 8),
            "lora_te2_x.lora_up.weight": torch.zeros(8, 2)}  # fmt: skip
    pipe = load_pipeline(folder, loras=[(more, 1.0)], strict_loras=False, **DISK)
    with pytest.raises(distorch.FormatError, match="text_encoder_2"):
        set_pipeline_loras(pipe, [(more, 1.0)])


def test_which_part_a_lora_is_for():
    from distorch.integrations.lora_parts import LoraSplitter

    def parts_of(parts, prefix):
        key = f"{prefix}down_blocks_0_x.lora_down.weight"
        shares = LoraSplitter(parts).split([({key: torch.zeros(2, 2)}, 1.0)])
        return [name for name, loras in shares.items() if loras]

    assert parts_of(["controlnet", "text_encoder", "unet", "vae"], "lora_unet_") == ["unet"]
    assert parts_of(["motion_adapter", "unet"], "") == ["unet"]
    flux = ["text_encoder", "text_encoder_2", "transformer"]
    assert parts_of(flux, "lora_te3_") == ["text_encoder_2"]
    assert parts_of([*flux, "text_encoder_3"], "lora_te3_") == ["text_encoder_3"]
    assert parts_of(["transformer", "transformer_2"], "transformer.") == ["transformer"]
    minimax = ["transformer", "transformer_ref"]
    assert parts_of(minimax, "transformer_ref.") == ["transformer_ref"]
    assert parts_of(minimax, "transformer.") == ["transformer"]
