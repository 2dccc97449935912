# SPDX-License-Identifier: Apache-2.0
"""What load_pipeline and its kin refuse, and that nothing is left half done."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import distorch
from distorch.integrations import (
    load_pipeline,
    load_pretrained,
)
from tests import tiny_models as tiny
from tests.integrations.pipelines import (
    DISK,
    resident,
)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"files": {"unit": "x.safetensors"}}, "the pipeline has no such part; did you mean 'unet'"),
        ({"files": {"unet": "none.safetensors"}}, "none.safetensors.*no such file"),
        ({"dtype": {"unit": torch.float16}}, "there is no such part; expected 'default' or.*unet"),
        ({"dtype": "int8"}, "computes in float32, float16 or bfloat16"),
        ({"config": "somewhere"}, "config='somewhere' goes with one file"),
        ({"spec": "cpu,lots"}, "'lots' is not a share"),
        ({"spec": None, "virtual_vram": "1kb", "donor": "dosk"}, "unknown device 'dosk'"),
        ({"torch_dtype": torch.float16}, "here it is called dtype="),
        ({"device_map": "auto"}, "a placement says where weights go"),
        ({"safety_checker": None}, "components="),
        ({"strict": True}, "there is no option strict="),
        ({"component": {}}, "did you mean components="),
        ({"cls": "FluxPipelines"}, "is none that this version of diffusers has"),
        ({"keeps": ["unet.*"]}, "there is no option keeps=; did you mean keep=?"),
        ({"progress": 3}, "progress=3"),
        ({"loras": "style.safetensors"}, "expected"),
        ({"components": {"text_encodr": None}}, "no such part; did you mean 'text_encoder'?"),
        ({"lora_mode": "lazy"}, "lora_mode='lazy'"),
        ({"spec": "cuda:7,1gb;cpu,*"}, "this machine has"),
    ],
)  # fmt: skip
def test_wrong_options(folders, options, said):
    folder, _ = folders(tiny.stable_diffusion)
    with pytest.raises(distorch.DistorchError, match=said):
        load_pipeline(folder, **{**DISK, **options})


def test_what_is_wrong_is_said_before_a_file_is_opened(tmp_path):
    for options in ({"spec": "cpu,lots"}, {"lora_mode": "lazy"}, {"resident": "wide"}):
        with pytest.raises(distorch.SpecError):
            load_pipeline(tmp_path / "nowhere", **{**DISK, **options})


def test_dtypes_by_part(folders):
    folder, _ = folders(tiny.stable_diffusion)
    pipe = load_pipeline(folder, dtype={"vae": torch.float32, "default": "auto"}, **DISK)
    assert pipe.vae.dtype is torch.float32
    assert pipe.unet.dtype is pipe.text_encoder.dtype is torch.bfloat16
    assert load_pipeline(folder, dtype={"vae": "float16"}, **DISK).unet.dtype is torch.float32


@pytest.mark.parametrize(
    ("index", "said"),
    [("[]", "expected a table of parts"), ("{", "is not JSON"),
     ('{"_class_name": ["pipeline", "Odd"]}', "give cls="),
     ('{"_class_name": "OddPipeline"}', "the pipeline 'OddPipeline' .*give cls=")],
)  # fmt: skip
def test_indexes_that_cannot_be_followed(folder, index, said):
    (folder / "model_index.json").write_text(index)
    with pytest.raises(distorch.DistorchError, match=said):
        load_pipeline(folder, **DISK)


def test_code_that_comes_with_a_part_is_not_run(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["odd", "OddModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "odd.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(distorch.SpecError, match=r"'unet' comes with code of its own .odd.py"):
        load_pipeline(folder, **DISK)


@pytest.mark.parametrize(
    ("entry", "code", "said"),
    [({"_class_name": ["odd", "Odd"]}, "odd.py", r"the pipeline .* code of its own .odd.py."),
     ({}, "None.py", r"the pipeline .* code of its own .None.py."),
     ({"scheduler": ["odd", "Odd"]}, "scheduler/odd.py", "'scheduler' comes with code of its own"),
     ({"scheduler": ["../odd", "Odd"]}, "odd.py", "'scheduler' comes with code of its own"),
     ({"scheduler": ["odd_library", "Odd"]}, None, "the library 'odd_library', which is not imp"),
     ({"../vae": ["diffusers", "AutoencoderKL"]}, None, r"a part '\.\./vae', which is no name")],
)  # fmt: skip
def test_code_that_an_index_names_is_not_run(folder, entry, code, said, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    text = f"open({str(ran)!r}, 'w')\nclass Odd: pass\n"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for file in filter(None, [code, "odd_library.py"]):
        (folder / file).write_text(text)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entry))
    with pytest.raises(distorch.DistorchError, match=said):
        load_pipeline(folder, cls=StableDiffusionPipeline, **DISK)
    assert not ran.exists()


def test_a_broken_scheduler_leaves_given_parts_alone(folder):
    mine = resident(folder).unet
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(
        distorch.FormatError, match="diffusers cannot make a StableDiffusionPipeline"
    ):
        load_pipeline(folder, components={"unet": mine}, **DISK)
    assert not any(distorch.is_sharded(p) for p in mine.parameters())


def test_folders_that_are_no_pipelines(folder, tmp_path):
    with pytest.raises(distorch.FormatError, match=r"is no pipeline: it has no model_index.json"):
        load_pipeline(tmp_path, **DISK)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(distorch.FormatError, match="vae: there are no weights in"):
        load_pipeline(folder, **DISK)
    shutil.rmtree(folder / "vae")
    with pytest.raises(distorch.FormatError, match="'vae', which model_index.json lists"):
        load_pipeline(folder, **DISK)


def test_what_is_meant_for_the_other_function(folders, tmp_path):
    folder, _ = folders(tiny.stable_diffusion)
    with pytest.raises(distorch.FormatError, match="is a pipeline .*load_pipeline, or subfolder="):
        load_pretrained(folder, **DISK)
    with pytest.raises(distorch.FormatError, match="It is of a model of diffusers"):
        load_pretrained(folder / "unet", **DISK)
    with pytest.raises(distorch.FormatError, match="of one model .config.json.: load_pretrained"):
        load_pipeline(folder / "unet", **DISK)
    with pytest.raises(distorch.FormatError, match="is a file: expected a folder, or one file"):
        load_pipeline(folder / "model_index.json", **DISK)
    file = folder / "text_encoder" / "model.safetensors"
    with pytest.raises(distorch.FormatError, match="is a file: expected the folder that it is in"):
        load_pretrained(file, **DISK)


def test_a_damaged_part_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("decoder.conv_in.weight")
    save_file(tensors, path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("DISTORCH_DISK", str(scratch))
    with pytest.raises(distorch.FormatError, match="vae: .*1 missing .decoder.conv_in.weight"):
        load_pipeline(folder, **DISK)
    assert list(scratch.iterdir()) == []
    assert torch.get_default_dtype() is torch.float32
