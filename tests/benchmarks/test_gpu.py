"""benchmarks/gpu.py runs: tiny, where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*options, status=0):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr[-4000:]
    return done


def test_on_the_simulated_accelerator(tmp_path):
    run("--device", "sim", "--rounds", "1", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["card"] == "none: sim"
    host, peer = found["links"]
    assert [host["from"], peer["from"]] == ["cpu", "sim:1"]
    assert 0.95 <= host["engine_over_best_plain"] <= 1
    assert len(found["kernels"]) == 9
    assert all(row["bytes"] > 0 and row["over_copy"] > 0 for row in found["kernels"])
    assert len(found["hook"]) == 12
    total = found["model"]["bytes"]
    for row, share in zip(found["overlap"], (25, 50, 75, 100), strict=True):
        assert row["offloaded_percent"] == share
        assert row["bytes"] == pytest.approx(total * share / 100, rel=0.1)
        assert row["step_s"] >= 0.999 * max(row["compute_s"], row["link_s"])
    rows = {row["system"]: row for row in found["systems"]}
    assert set(rows) == {"resident", "distorch", "accelerate cpu_offload", "resident, again"}
    assert rows["resident"]["step_s"] == pytest.approx(rows["resident, again"]["step_s"])
    assert rows["distorch"]["peak_bytes"] < rows["resident"]["peak_bytes"]


def test_on_the_host(tmp_path):
    """Where diffusers' group offloading runs, too: the same bits, which the program asserts."""
    run("--device", "cpu", "--only", "systems", "--rounds", "1", "--json", str(tmp_path / "f.json"))
    rows = json.loads((tmp_path / "f.json").read_text())["systems"]
    groups = [row for row in rows if "diffusers group offloading" in row["system"]]
    ours = [row for row in rows if row["system"] == "distorch, memory of group offloading"]
    assert len(groups) == 2
    assert ours[0]["over_group_offloading"] == ours[0]["step_s"] / groups[0]["step_s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so():
    done = run(status=2)
    assert "there is no CUDA device here" in done.stderr
    assert "--device sim" in done.stderr


def test_help():
    assert "--device" in run("--help").stdout
