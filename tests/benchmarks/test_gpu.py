# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py runs: tiny, where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*options, status=0, before=""):
    """The program with these options; `before` is code that runs first, beside it."""
    text = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r})\n{before}\nimport gpu; gpu.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr[-4000:]
    return done


def test_on_the_simulated_accelerator(tmp_path):
    """In two runs, which fill one file."""
    path = tmp_path / "found.json"
    options = ["--device", "sim", "--rounds", "1", "--json", str(path), "--only"]
    run(*options, "links", "kernels")
    links = json.loads(path.read_text())["links"]
    run(*options, "hook", "overlap", "systems")
    found = json.loads(path.read_text())
    assert found["card"] == "none: sim"
    assert found["done"] == ["links", "kernels", "hook", "overlap", "systems"]
    assert found["links"] == links  # the rate of overlap is taken from there
    host, peer = links
    assert [host["from"], peer["from"]] == ["cpu", "sim:1"]
    assert 0.95 <= host["engine_over_best_plain"] <= 1
    copied, *kernels = found["kernels"]
    assert [copied["kernel"], copied["over_copy"]] == ["copy on the device", 1]
    assert len(kernels) == 9
    for row in kernels:
        assert row["over_copy"] == row["bytes_per_s"] / copied["bytes_per_s"]
        assert row["bytes"] * row["buffers"] >= 4 << 16  # four times the cache
    assert len(found["hook"]) == 12
    total = found["model"]["bytes"]
    rate = max(v for k, v in host["bytes_per_s"].items() if k != "engine")
    for row, share in zip(found["overlap"], (25, 50, 75, 100), strict=True):
        assert row["offloaded_percent"] == share
        assert row["bytes"] == pytest.approx(total * share / 100, rel=0.1)
        assert row["link_s"] == row["bytes"] / rate
        assert row["wall_s"] >= row["step_s"] >= 0.999 * max(row["compute_s"], row["link_s"])
    rows = {row["system"]: row for row in found["systems"]}
    measured = {"resident", "distorch", "accelerate cpu_offload", ".to() per block"}
    assert set(rows) == measured | {"FlexTensor", "resident, again"}
    assert [name for name, row in rows.items() if "error" in row] == ["FlexTensor"]
    assert rows["resident"]["step_s"] == pytest.approx(rows["resident, again"]["step_s"])
    assert rows["distorch"]["peak_bytes"] < rows["resident"]["peak_bytes"]

    path.write_text(json.dumps({**found, "card": "another"}))
    assert "give another --json" in run(*options, "hook", status=2).stderr


def test_on_the_host(tmp_path):
    """Where diffusers' group offloading runs, too; a system that fails does not end the others."""
    path = tmp_path / "f.json"
    broken = "import _flux; _flux.moved_by_hand = lambda *_: 1 / 0"
    run("--device", "cpu", "--only", "systems", "--rounds", "1", "--json", str(path), before=broken)
    rows = json.loads(path.read_text())["systems"]
    groups = [row for row in rows if "diffusers group offloading" in row["system"]]
    ours = [row for row in rows if row["system"] == "distorch, memory of group offloading"]
    assert len(groups) == 2
    assert ours[0]["over_group_offloading"] == ours[0]["step_s"] / groups[0]["step_s"]
    errors = {row["system"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        ".to() per block": "ZeroDivisionError: division by zero", "FlexTensor": "needs CUDA",
    }  # fmt: skip


def test_a_killed_run_leaves_what_it_measured(tmp_path):
    path = tmp_path / "f.json"
    killed = "import os, _flux; _flux.accelerate_offloading = lambda *_: os._exit(9)"
    options = ["--device", "cpu", "--only", "systems", "--rounds", "1", "--json", str(path)]
    run(*options, before=killed, status=9)
    found = json.loads(path.read_text())
    assert [row["system"] for row in found["systems"]] == ["resident", "distorch"]
    assert found["done"] == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so():
    done = run(status=2)
    assert "there is no CUDA device here" in done.stderr
    assert "--device sim" in done.stderr


def test_help():
    assert "--device" in run("--help").stdout
