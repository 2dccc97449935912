# SPDX-License-Identifier: Apache-2.0
"""The command line: output, pictures, and exit status 0 / 1 / 2."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.cli import main
from distorch.demo import run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {f"blocks.{i}.weight": torch.zeros(64, 64, dtype=torch.bfloat16) for i in range(4)}
    save_file(tensors | {"bias": torch.zeros(64)}, path, {"made_by": "a test"})
    return str(path)


def test_inspect(checkpoint, capsys):
    assert main(["inspect", checkpoint, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"] == 5
    assert facts["dtypes"] == {"bfloat16": 4 * 64 * 64 * 2, "float32": 256}
    assert main(["inspect", checkpoint]) == 0
    out = capsys.readouterr().out
    assert "checkpoint" in out
    assert "a test" in out
    assert "64x64" in out


@pytest.mark.parametrize(
    ("suffixes", "kind"),
    [
        ((".lora_A.weight", ".lora_B.weight"), "LoRA (PEFT spelling)"),
        ((".lora_down.weight", ".lora_up.weight"), "LoRA (kohya spelling)"),
        ((".hada_w1_a", ".hada_w1_b"), "LoHa"),
    ],
)
def test_inspect_lora(tmp_path, capsys, suffixes, kind):
    shapes = [(8, 32), (64, 8)]
    save_file(
        {f"x{s}": torch.zeros(shape) for s, shape in zip(suffixes, shapes, strict=True)},
        tmp_path / "l.safetensors",
    )
    assert main(["inspect", str(tmp_path / "l.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == kind
    if "LoRA" in kind:
        assert facts["lora_ranks"] == {"8": 1}


def test_plan(checkpoint, capsys, tmp_path):
    arguments = ["plan", checkpoint, "cpu,10kb;disk,*", "--min-bytes", "0"]
    assert main([*arguments, "--json", "--plot", str(tmp_path / "plan.png")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sorted(set(plan["placement"].values())) == ["cpu", "disk"]
    assert (tmp_path / "plan.png").read_bytes().startswith(PNG)
    assert main([*arguments, "--plot", str(tmp_path / "plan.svg")]) == 0
    assert "disk" in capsys.readouterr().out
    assert "blocks.0.weight: 8.00 KiB on " in (tmp_path / "plan.svg").read_text()


def test_trace(tmp_path, capsys):
    model = distorch.distribute(nn.Linear(64, 64), "cpu,0b;disk,*", min_bytes=0, progress=False)
    with distorch.trace(model, tmp_path / "t.json"):
        model(torch.ones(1, 64))
    arguments = ["trace", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.svg")]
    assert main(arguments) == 0
    assert "compute cpu" in capsys.readouterr().out
    assert "milliseconds" in (tmp_path / "t.svg").read_text()
    assert main([*arguments[:2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tracks"]["compute cpu"]["spans"] == 1
    (tmp_path / "t.json").write_text("[]")
    assert main(arguments) == 1
    assert "trace of another program" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "status"), [("p.pdf", 2), ("nowhere/p.svg", 1)])
def test_a_picture_that_cannot_be_written(checkpoint, tmp_path, capsys, name, status):
    spec, picture = "cpu,10kb;disk,*", tmp_path / name
    assert main(["plan", checkpoint, spec, "--min-bytes", "0", "--plot", str(picture)]) == status
    said = capsys.readouterr()
    assert said.err.startswith("distorch: a picture: ") and not said.out


@pytest.mark.parametrize("spec", ["cpu,2tbb;disk,*", "cpu,1gb;cpu,*", "", "gpu,1gb;*"])
def test_wrong_spec_is_wrong_use(checkpoint, capsys, spec):
    assert main(["plan", checkpoint, spec]) == 2
    assert capsys.readouterr().err.startswith("distorch: ")


def test_failures_are_status_one(tmp_path, checkpoint, capsys):
    assert main(["inspect", str(tmp_path / "none.safetensors")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["plan", checkpoint, "cuda:7,1gb;cpu,*"]) == 1
    assert "cuda:7" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["plan"], ["inspect", "a", "--what"]])
def test_wrong_use_is_status_two(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"distorch {metadata.version('distorch')}\n"


@pytest.mark.parametrize(("count", "dtype"), [("3", torch.bfloat16), ("13", torch.float32)])
def test_demo(tmp_path, capsys, monkeypatch, count, dtype):
    monkeypatch.setattr(run, "quick_dtype", lambda device: dtype)
    out = tmp_path / "new" / "digits.png"
    assert main(["demo", "--out", str(out), "--count", count, "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("every bit the same") == 2
    assert "as planned" in text
    assert "disk" in text
    assert str(dtype) in text
    assert out.read_bytes().startswith(PNG)


def test_a_share_that_is_too_small_is_told_without_code(checkpoint, capsys):
    assert main(["plan", checkpoint, "cpu,1b;disk,*"]) == 0
    told = capsys.readouterr().err
    assert told.startswith("distorch: cpu gets") and "min_bytes='auto'" in told
    assert ".py" not in told


def test_demo_refuses_nonsense(capsys):
    assert main(["demo", "--steps", "0"]) == 2
    assert main(["demo", "--spec", "cpu;disk"]) == 2


def test_as_a_module_without_a_terminal(checkpoint):
    """No progress bar and no colour in a pipe; help names every command."""
    done = subprocess.run(
        [sys.executable, "-m", "distorch", "--help"],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    for command in ("inspect", "plan", "trace", "doctor", "calibrate", "demo"):
        assert command in done.stdout
    assert "\x1b" not in done.stdout


def test_inspect_says_how_much_of_a_lora_fits(checkpoint, tmp_path, capsys):
    stem, (rows, columns) = "lora_unet_blocks_0", (64, 64)
    lora = {
        f"{stem}.lora_down.weight": torch.ones(2, columns),
        f"{stem}.lora_up.weight": torch.ones(rows, 2),
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2),
        "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2),
    }
    save_file(lora, tmp_path / "l.safetensors")
    assert main(["inspect", str(tmp_path / "l.safetensors"), "--fits", checkpoint, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "LoRA (kohya spelling)" and facts["lora_ranks"] == {"2": 2}
    assert facts["fits"]["targets"] == facts["fits"]["weights"] == 1
    assert facts["fits"]["unmatched"] == ["lora_unet_nowhere"]
    assert main(["inspect", str(tmp_path / "l.safetensors"), "--fits", checkpoint]) == 0
    assert "lora_unet_nowhere" in capsys.readouterr().out

    lora = {
        "blocks.0.lora_down.weight": torch.ones(2, 9),
        "blocks.0.lora_up.weight": torch.ones(3, 2),
    }
    save_file(lora, tmp_path / "l.safetensors")
    assert main(["inspect", str(tmp_path / "l.safetensors"), "--fits", checkpoint]) == 1
    assert "was made for [3, 9] of rank 2, the weight's shape is" in capsys.readouterr().out


@pytest.mark.parametrize("names", ["w1 w3 w2", "gate_proj up_proj down_proj"])
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_inspect_knows_experts_as_transformers_keeps_them(tmp_path, capsys, names, block):
    """A checkpoint has a tensor for each expert, the model a stack of them."""
    state = {
        f"model.layers.0.{block}.experts.{i}.{name}.weight": torch.ones(shape)
        for i in range(3)
        for name, shape in zip(names.split(), [(6, 4), (6, 4), (4, 6)], strict=True)
    }
    save_file(state, tmp_path / "base.safetensors")
    one = {
        f"model.layers.0.mlp.experts.2.up_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("down", (2, 4)), ("up", (6, 2)))
    }
    stack = {
        f"base_model.model.model.layers.0.mlp.experts.{level}lora_{side}.weight": torch.ones(shape)
        for level, (rows, columns) in (("base_layer.", (12, 4)), ("", (4, 6)))
        for side, shape in (("A", (6, columns)), ("B", (rows, 6)))
    }
    for lora, weights in ((one, 1), (stack, 2)):
        save_file(lora, tmp_path / "l.safetensors")
        arguments = [str(tmp_path / "l.safetensors"), "--fits", str(tmp_path / "base.safetensors")]
        assert main(["inspect", *arguments, "--json"]) == 0
        fits = json.loads(capsys.readouterr().out)["fits"]
        assert (fits["targets"], fits["weights"], fits["unmatched"]) == (weights, weights, [])
