# SPDX-License-Identifier: Apache-2.0
"""Pipelines from the files that people have: other weights for a part, variants, one file for all."""

import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import distorch
from distorch.integrations import (
    load_pipeline,
    pipeline_report,
)
from tests import tiny_models as tiny
from tests.integrations.pipelines import (
    DISK,
    assert_same,
    original_names,
    resident,
)


def test_files_for_a_part_and_components(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    other = {
        k: v * 2
        for k, v in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items()
    }
    save_file(other, tmp_path / "other.safetensors")
    scheduler = diffusers.EulerDiscreteScheduler()
    mine = resident(folder).text_encoder
    pipe = load_pipeline(
        folder, files={"unet": str(tmp_path / "other.safetensors")},
        components={"scheduler": scheduler, "text_encoder": mine}, **DISK,
    )  # fmt: skip
    assert pipe.scheduler is scheduler
    assert pipe.text_encoder is mine
    assert distorch.report(mine).bytes["disk"] > 0
    for name, value in other.items():
        assert torch.equal(pipe.unet.state_dict()[name], value)


def test_variants(folder):
    with pytest.raises(distorch.FormatError, match=r"variant='fp16'.*model.fp16.safetensors"):
        load_pipeline(folder, variant="fp16", **DISK)
    reference = resident(folder, torch.float16)
    reference.save_pretrained(folder, variant="fp16")
    assert_same(load_pipeline(folder, variant="fp16", **DISK), reference)


def test_attention_names_of_old_decoders(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for name in list(tensors):
        for ours, old in new.items():
            if f".attentions.0.{ours}." in name:
                tensors[name.replace(ours, old)] = tensors.pop(name)
    assert any(".query." in name for name in tensors)
    save_file(tensors, path)
    assert_same(load_pipeline(folder, **DISK), resident(folder))


def test_one_file_with_the_whole_pipeline(folders, tmp_path, monkeypatch):
    folder, _ = folders(tiny.stable_diffusion)
    reference = resident(folder)
    file = tmp_path / "sd.safetensors"
    save_file(original_names(reference), file)
    configuration = tmp_path / "config"
    shutil.copytree(folder, configuration, ignore=shutil.ignore_patterns("*.safetensors"))
    assert_same(load_pipeline(file, config=str(configuration), **DISK), reference)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(distorch.FormatError, match=r"taken for a whole pipeline.*config="):
        load_pipeline(file, **DISK)


def whole_file(reference, path, change=lambda tensors: tensors):
    save_file(change(original_names(reference)), path)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if not k.endswith("diffusion_model.out.2.weight")},
         "unet: .*1 missing .conv_out.weight"),
        (lambda t: {**t, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
         "unet: .*conv_in.*the file has shape"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_not_replaced_by_the_folders(folders, tmp_path, change, said):
    folder, _ = folders(tiny.stable_diffusion)
    file = whole_file(resident(folder), tmp_path / "sd.safetensors", change)
    with pytest.raises(distorch.FormatError, match=said):
        load_pipeline(file, config=str(folder), **DISK)


def test_what_a_whole_file_lacks_is_from_the_folder(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    other = resident(folder)
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(2)
    file = whole_file(
        other, tmp_path / "sd.safetensors",
        lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")},
    )  # fmt: skip
    assert_same(load_pipeline(file, config=str(folder), **DISK), other)
    (tmp_path / "config").mkdir()
    shutil.copytree(
        folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"),
        dirs_exist_ok=True,
    )  # fmt: skip
    with pytest.raises(distorch.FormatError, match=r"has no weights of 'vae'.*files=.*'vae'"):
        load_pipeline(file, config=str(tmp_path / "config"), **DISK)


def test_a_file_for_a_part_is_never_replaced(folders, tmp_path, monkeypatch, caplog):
    """Where its conversion would compute, it is refused; only the folder's own is loaded whole."""
    folder, _ = folders(tiny.stable_diffusion)
    save_file(original_names(resident(folder)), tmp_path / "other.safetensors")
    monkeypatch.setattr("distorch.formats.naming.tracing._MOST_PIECES", 0)
    with pytest.raises(distorch.FormatError, match="vae: .*the conversion to the module's names"):
        load_pipeline(folder, files={"vae": str(tmp_path / "other.safetensors")}, **DISK)
    assert "is loaded whole" not in caplog.text


def test_models_that_diffusers_loads_itself(folder, monkeypatch):
    """A class that cannot be made empty: it is placed afterwards, within the same budget."""
    from distorch.integrations import source

    real = source._class_of
    monkeypatch.setattr(
        source, "_class_of",
        lambda library, name: None if name == "AutoencoderKL" else real(library, name),
    )  # fmt: skip
    pipe = load_pipeline(folder, **DISK)
    assert_same(pipe, resident(folder))
    assert pipeline_report(pipe).parts["vae"].bytes["disk"] > 0
