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

from distorch.cli import doctor, main
from distorch.cli.doctor import Findings
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
    picture = tmp_path / "plan.png"
    arguments = ["plan", checkpoint, "cpu,10kb;disk,*", "--min-bytes", "0"]
    assert main([*arguments, "--json", "--plot", str(picture)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sorted(set(plan["placement"].values())) == ["cpu", "disk"]
    assert picture.read_bytes().startswith(PNG)
    assert main(arguments) == 0
    assert "disk" in capsys.readouterr().out


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


def test_doctor(capsys):
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert status == (0 if findings["ok"] else 1)
    passed = {name: ok for name, ok, _ in findings["checks"]}
    assert passed["a weight in RAM gives the same bits"]
    assert passed["a weight on disk gives the same bits"]
    assert {"cpu", "disk"} <= set(findings["devices"])
    assert findings["versions"]["torch"]
    assert main(["doctor"]) == status
    assert "same bits" in capsys.readouterr().out


def test_doctor_tells_a_folder_in_ram(monkeypatch):
    assert "donor files go to a disk, not to RAM" not in wrong_checks()
    monkeypatch.setattr("distorch._native.in_memory", lambda folder: True)
    assert "donor files go to a disk, not to RAM" in wrong_checks()


def wrong_checks():
    return [name for name, passed, _ in doctor.examine().checks if not passed]


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"distorch {metadata.version('distorch')}\n"


@pytest.mark.parametrize(
    ("there", "loads", "said"),
    [
        (True, False, "DISTORCH_CUDA=1 pip install"),
        (False, False, "nvidia-smi"),
        (True, True, None),
    ],
)
def test_doctor_looks_at_the_gpu(monkeypatch, there, loads, said):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("distorch._native.has_cuda_kernels", lambda: loads)
    wrong = [remedy for _, passed, remedy in doctor.gpu_checks() if not passed]
    assert len(wrong) == (said is not None)
    assert all(said in remedy for remedy in wrong)


def test_doctor_says_what_to_do():
    text = str(Findings({}, {}, "/x", [("the disk has room", False, "set DISTORCH_DISK")]))
    assert "NO" in text
    assert "set DISTORCH_DISK" in text


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
    for command in ("inspect", "plan", "doctor", "demo"):
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
