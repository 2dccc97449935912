# SPDX-License-Identifier: Apache-2.0
"""Wrong values of every option: a SpecError or PlacementError that says what was expected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distorch

SPEC = "cpu,0b;disk,*"


def net():
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


WRONG_OPTIONS = [
    {"min_bytes": None},
    {"min_bytes": float("nan")},
    {"min_bytes": 1.5},
    {"min_bytes": -1},
    {"min_bytes": "1 mile"},
    {"keep": 5},
    {"keep": [5]},
    {"offload": None},
    {"rules": [("0.*",)]},
    {"rules": {}},
    {"rules": "0.*"},
    {"rules": [("0.*", 1)]},
    {"compute": "disk"},
    {"compute": "meta"},
    {"compute": "foo"},
    {"compute": 3},
    {"prefetch": "much"},
    {"prefetch": -1},
    {"prefetch": None},
    {"compress": "yes"},
    {"compress": None},
]


@pytest.mark.parametrize("options", WRONG_OPTIONS, ids=str)
def test_wrong_options(options):
    module = net()
    for call in (distorch.distribute, distorch.plan):
        with pytest.raises(distorch.SpecError, match=f"{next(iter(options))}|placement|not a"):
            call(module, SPEC, **options)
    assert not any(distorch.is_sharded(p) for p in module.parameters())
    distorch.distribute(module, SPEC, min_bytes=0)
    with pytest.raises(distorch.SpecError):
        distorch.redistribute(module, SPEC, **options)
    assert distorch.report(module).ok


@pytest.mark.parametrize("donor", [5, "", "cpu"])
def test_wrong_donor(donor):
    with pytest.raises(distorch.SpecError, match="donor"):
        distorch.distribute(net(), virtual_vram="1kb", donor=donor)


def test_the_donor_of_a_cpu_is_the_disk():
    module = distorch.distribute(net(), virtual_vram="1gb", min_bytes=0)
    assert set(distorch.report(module).bytes) == {"cpu", "disk"}


def test_a_module_that_torch_compile_wraps():
    module = distorch.distribute(net(), SPEC, min_bytes=0)
    with pytest.raises(distorch.PlacementError, match=r"model\._orig_mod.*model\.compile\(\)"):
        distorch.report(torch.compile(module))


def test_a_plan_that_is_none(tmp_path):
    with pytest.raises(distorch.SpecError, match=r"Plan\.load"):
        distorch.distribute(net(), plan="p.json")


@pytest.mark.parametrize(
    ("name", "compute", "error"),
    [("disk", "disk", distorch.SpecError), ("cuda", "cuda:7", distorch.PlacementError)],
)
def test_a_plan_for_another_machine(name, compute, error):
    plan = distorch.plan(net(), SPEC, min_bytes=0)
    object.__setattr__(plan, "compute", compute)
    with pytest.raises(error, match=name):
        distorch.distribute(net(), plan=plan)


@pytest.mark.parametrize("device", ["foo", "disk", "meta", "cuda:9"])
def test_undistribute_to_nowhere(device):
    module = distorch.distribute(net(), SPEC, min_bytes=0)
    with pytest.raises((distorch.SpecError, distorch.PlacementError), match="device="):
        distorch.undistribute(module, device=device)
    assert distorch.report(module).ok


@pytest.mark.parametrize("compute", ["foo", "disk", "meta", 5])
def test_shard_for_nowhere(compute):
    with pytest.raises(distorch.SpecError, match="compute="):
        distorch.shard(torch.ones(3), compute=compute)


def test_names_are_spelled_freely():
    sharded = distorch.shard(torch.ones(3), " Disk ", compute="CPU")
    assert (sharded + 1).tolist() == [2, 2, 2]
    module = distorch.distribute(net(), SPEC, min_bytes=0, compute=torch.device("cpu"))
    assert distorch.report(distorch.redistribute(module, SPEC)).ok


def test_a_ring_larger_than_the_model_is_as_large_as_the_model():
    module = distorch.distribute(net(), SPEC, min_bytes=0, prefetch=10**15)
    assert module(torch.ones(1, 32)).shape == (1, 32)


@pytest.mark.parametrize("threads", ["x", "0", "-3", "1e9"])
def test_wrong_thread_count(threads):
    run = subprocess.run(
        [sys.executable, "-c", "import distorch"],
        env=os.environ | {"DISTORCH_IO_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "SpecError: DISTORCH_IO_THREADS=" in run.stderr


@pytest.mark.parametrize("variable", ["DISTORCH_DISK", "TMPDIR"])
def test_a_folder_for_donors_whose_name_is_no_text(variable, tmp_path):
    folder = os.fsencode(tmp_path) + b"/latin\xff"
    Path(os.fsdecode(folder)).mkdir()
    run = subprocess.run(
        [sys.executable, "-c", "import distorch"],
        env=os.environb | {variable.encode(): folder}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "expected a path in UTF-8; set DISTORCH_DISK" in run.stderr
    assert "latin" in run.stderr and "SpecError" in run.stderr


def test_a_folder_for_donors_that_is_not_there(tmp_path):
    program = f"""
import distorch, torch
module = torch.nn.Sequential(torch.nn.Linear(8, 8))
distorch.distribute(module, "cpu,*", min_bytes=0)
try:
    distorch.redistribute(module, {SPEC!r})
except distorch.PlacementError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"DISTORCH_DISK": str(tmp_path / "absent")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DISTORCH_DISK" in run.stdout, run.stderr
