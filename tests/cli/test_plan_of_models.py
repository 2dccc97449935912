# SPDX-License-Identifier: Apache-2.0
"""distorch plan --model and --machine: what is not at hand, and not downloaded."""

import json

import pytest
import torch
from safetensors.torch import save_file

import distorch
from distorch.cli import main

MACHINE = "rtx3090-pcie4x16-64gb"
LLAMA = ["plan", "--model", "llama-70b"]


def test_a_well_known_model(capsys, tmp_path):
    spec = "cuda:0,8gb;cpu,48gb;disk,*"
    arguments = [*LLAMA, spec, "--machine", f"{MACHINE}-nvme4", "--tokens", "16"]
    assert main([*arguments, "--plot", str(tmp_path / "plan.svg")]) == 0
    text = capsys.readouterr().out
    assert "131.42 GiB" in text  # 70.55e9 numbers of bfloat16
    assert "a step takes" in text
    assert "16 tokens of text, batch 1" in text
    assert "of look-ahead, of 24.00 GiB; " in text
    assert "disk is busy all the time" in text
    assert "operators from their shapes, links and speeds from data sheets" in text
    assert (tmp_path / "plan.svg").exists()
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["spec"] == spec
    assert told["machine"]["name"] == f"{MACHINE}-nvme4"
    assert told["prediction"]["binds"] == "disk"


def test_options_may_stand_anywhere(capsys):
    arguments = ["--machine", MACHINE, "--model=FLUX-dev", "cuda:0,*", "--size", "256x256"]
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert "a step takes" in text
    assert "text encoders and VAE are left out" in text
    assert "256x256 pixels, 512 tokens of text, batch 1" in text


def test_a_file_for_another_machine(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.zeros(1 << 20), "v": torch.zeros(1 << 20)}, path)
    distorch.Machine.named(MACHINE).save(tmp_path / "machine.json")
    for machine in MACHINE, str(tmp_path / "machine.json"):
        arguments = ["plan", str(path), "cuda:0,4mb;cpu,*", "--min-bytes", "0", "--json"]
        assert main([*arguments, "--machine", machine]) == 0
        assert json.loads(capsys.readouterr().out)["bytes"] == {"cuda:0": 4 << 20, "cpu": 4 << 20}


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (["--model", "flux", "cuda:0,*", "--machine", MACHINE], 2, "expected one of the models flux-dev"),
    ([*LLAMA[1:], "cuda:0,*", "--machine", "gtx-1"], 2, "is not known as a GPU"),
    ([*LLAMA[1:], "cuda:0,*", "--machine", "absent.json"], 1, "cannot read the machine"),
    ([*LLAMA[1:], "cuda:0,4xb", "--machine", MACHINE], 2, "4xb"),
    (["--model", "flux-dev", "cuda:0,*", "--machine", MACHINE, "--size", "9"], 2, "expected a width"),
    ([*LLAMA[1:], "cuda:0,*", "--machine", MACHINE, "--size", "8x8"], 2, "size= is nothing that"),
    (["--model", "flux-dev", "cuda:0,*", "--frames", "5"], 2, "frames= is nothing that"),
    (["m.safetensors", "cuda:0,*", "--curve"], 2, "--curve goes with --model"),
    (["m.safetensors", "cuda:0,*", "--step", "s.json"], 2, "--step goes with --order optimal"),
    (["m.safetensors", "cuda:0,*", "--mod", "flux-dev"], 2, ""),
    ([*LLAMA[1:], "cuda:0,*", "--machine", MACHINE, "--batch", "0"], 2, "batch=0"),
    ([*LLAMA[1:], "cuda:0,*", "--machine", MACHINE, "--step", "s.json"], 2, "goes with a file"),
    ([*LLAMA[1:], "cuda:0,*", "--machine", MACHINE], 1, "131.42 GiB"),  # it does not fit
    (["--model", "flux-dev", "cuda:0,*", "--machine", MACHINE, "--size", "999x999"], 2, "of 16"),
    (["--model", "wan22-14b", "cuda:0,*", "--machine", MACHINE, "--frames", "80"], 2, "as 81"),
])  # fmt: skip
def test_mistakes_are_said(arguments, status, said, capsys):
    try:
        assert main(["plan", *arguments]) == status
    except SystemExit as error:  # of argparse
        assert error.code == status
    assert said in capsys.readouterr().err


def test_a_file_and_a_model_are_one_too_many(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "m.safetensors", "cuda:0,*", "--model", "flux-dev"])
    assert exit_.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    for word in (
        "--machine",
        "--model",
        "--size",
        "--curve",
        "flux-dev",
        "llama-70b",
        "Machine.save",
    ):
        assert word in text
