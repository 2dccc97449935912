# SPDX-License-Identifier: Apache-2.0
"""Machines that are not at hand: named, from files, and predicted for."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest
import torch
from torch import nn

import distorch
from tests.prediction.programs import ALL_AWAY, chain, configure, inference, record, there

NAME = "rtx3090-pcie4x16-64gb-nvme4"
GB = 1 << 30


def link(machine, donor, compute="cuda:0"):
    return next(k for k in machine.calibration.links if (k.donor, k.compute) == (donor, compute))


# ---- what a name says ----------------------------------------------------------------


def test_parts_by_name():
    machine = distorch.Machine.named(NAME)
    assert machine.name == NAME
    assert machine.devices == {"cuda:0": 24 * GB, "cpu": 64 * GB, "disk": 10**12}
    assert 20e9 < link(machine, "cpu").rate < 31.5e9  # of PCIe 4.0 with 16 lanes
    assert link(machine, "disk").rate < 7e9
    (speed,) = machine.calibration.speeds
    assert 0.5 * 71e12 < speed.half_flops < 71e12
    assert 0.7 * 936e9 < speed.memory < 936e9


def test_lanes_and_generations():
    def rate(pcie):
        return link(distorch.Machine.named(f"rtx4090-{pcie}-64gb"), "cpu").rate

    assert rate("pcie4x8") == pytest.approx(rate("pcie4x16") / 2)
    assert rate("pcie3x16") == pytest.approx(rate("pcie4x8"), rel=0.01)
    assert rate("pcie5x16") == pytest.approx(2 * rate("pcie4x16"), rel=0.01)


def test_several_gpus_share_the_links_of_each():
    machine = distorch.Machine.named("2xrtx3090-pcie4x16-64gb")
    assert set(machine.devices) == {"cuda:0", "cuda:1", "cpu"}
    both = link(machine, "cpu").together + link(machine, "cuda:1").together
    assert both == pytest.approx(link(machine, "cpu").rate)
    linked = distorch.Machine.named("2xrtx3090-pcie4x16-64gb-nvlink")
    assert link(linked, "cuda:1").rate > link(linked, "cpu").rate == link(linked, "cpu").together


@pytest.mark.parametrize(("name", "known"), [
    ("rtx9999-pcie4x16-64gb", "rtx3090"),
    ("rtx3090-agp-64gb", "pcie4x8"),
    ("rtx4090-pcie4x16-64gb-nvlink", "between two or more of rtx3090"),
    ("rtx3090-pcie9x16-64gb", "3, 4, 5"),
    ("rtx3090-pcie4x7-64gb", "1, 2, 4, 8, 16"),
    ("rtx3090-64gb", "expected a GPU, its link and the RAM"),
    ("rtx3090-pcie4x16", "expected a GPU, its link and the RAM"),
    ("rtx3090-pcie4x16-64gb-32gb", "each once"),
    ("rtx3090-pcie4x16-0gb", "each once"),
    ("9xrtx3090-pcie4x16-64gb", "is not known as a GPU"),
    ("", "is not known as a GPU"),
    (7, "expected a name"),
])  # fmt: skip
def test_what_is_not_known_is_refused(name, known):
    with pytest.raises(distorch.SpecError) as error:
        distorch.Machine.named(name)
    assert known in str(error.value)


# ---- files ---------------------------------------------------------------------------


def test_a_machine_is_saved_and_loaded(tmp_path):
    path = tmp_path / "machine.json"
    machine = distorch.Machine.named(NAME)
    machine.save(path)
    assert distorch.Machine.load(path) == machine
    assert NAME in str(machine)
    assert "rtx3090" in machine._repr_html_()


def test_this_machine_can_be_saved(tmp_path):
    with pytest.raises(distorch.PlacementError, match="were not measured"):
        distorch.Machine.here()
    configure(rate=5e9)
    distorch.calibrate(progress=False)
    here = distorch.Machine.here()
    assert link(here, "cpu", "sim:0").rate == pytest.approx(5e9, rel=0.05)
    here.save(tmp_path / "here.json")
    module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6)))
    distorch.distribute(module, ALL_AWAY, min_bytes=0)
    x = torch.empty(256, 1024, device="sim:0")
    step = record(module, inference(module, x))
    now = distorch.predict(module, step, ALL_AWAY)
    told = distorch.predict(module, step, ALL_AWAY, machine=tmp_path / "here.json")
    assert told.seconds == pytest.approx(now.seconds, rel=1e-6)


DAMAGES = {
    "not there": None,
    "no JSON": lambda told: "{",
    "a list": lambda told: "[]",
    "something else": lambda told: json.dumps({"writer": "me"}),
    "another version": lambda told: json.dumps({**told, "version": 99}),
    "no devices": lambda told: json.dumps({k: v for k, v in told.items() if k != "devices"}),
    "bytes below zero": lambda told: json.dumps({**told, "devices": {"cpu": -1}}),
    "bytes in words": lambda told: json.dumps({**told, "devices": {"cpu": "64gb"}}),
    "no rate": lambda told: json.dumps({**told, "links": [{"donor": "cpu"}]}),
    "a rate of zero": lambda told: json.dumps({**told, "links": [{**told["links"][0], "rate": 0}]}),
    "no speed": lambda told: json.dumps({**told, "speeds": [{**told["speeds"][0], "flops": 0}]}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused(tmp_path, name):
    path = tmp_path / "machine.json"
    if DAMAGES[name] is not None:
        path.write_text(DAMAGES[name](distorch.Machine.named(NAME).to_dict()))
    with pytest.raises(distorch.FormatError, match=r"machine\.json"):
        distorch.Machine.load(path)


# ---- predicted for -------------------------------------------------------------------


def large(layers=20, width=8192):
    with torch.device("meta"):
        return nn.Sequential(
            *(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers))
        ).requires_grad_(False)


def estimated(module, machine=NAME, rows=16):
    x = torch.empty(rows, 8192, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), distorch.estimate_step(module, machine) as step:
        module(x)
    return step


def test_a_model_without_memory_on_a_machine_that_is_not_there():
    module, machine = large(), distorch.Machine.named(NAME)
    step = estimated(module)
    assert step.machine == NAME
    total = sum(p.nbytes for p in module.parameters())
    away = distorch.predict(module, step, "cuda:0,0b;cpu,*", machine=NAME)
    assert away.binds == "cpu->cuda:0"
    assert away.seconds == pytest.approx(total / link(machine, "cpu").rate, rel=0.02)
    from_disk = distorch.predict(module, step, "cuda:0,0b;disk,*", machine=NAME)
    assert from_disk.binds == "disk"
    assert total / 7e9 < from_disk.seconds < total / link(machine, "disk").rate  # copies overlap
    resident = distorch.predict(module, step, "cuda:0,*", machine=NAME)
    assert resident.seconds == pytest.approx(max(step.seconds, resident.compute_seconds), rel=0.01)


def test_plans_and_curves_for_it():
    module = large()
    step = estimated(module)
    options = {"machine": NAME, "order": "optimal", "step": step}
    plan = distorch.plan(module, "cuda:0,1gb;cpu,*", **options)
    assert plan.compute == "cuda:0"
    assert plan.bytes["cuda:0"] <= GB
    assert distorch.plan(module, "auto", machine=NAME).bytes.keys() == {"cuda:0"}  # all fits
    curve = distorch.curve(module, step, "cuda:0,1gb;cpu,*", points=3, progress=False, machine=NAME)
    assert curve.points[0][1] > curve.points[-1][1]


def test_a_file_for_it(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1 << 20), "v": torch.zeros(1 << 20)}, tmp_path / "f.safetensors")
    plan = distorch.plan(tmp_path / "f.safetensors", "cuda:0,4mb;cpu,*", machine=NAME, min_bytes=0)
    assert plan.bytes == {"cuda:0": 4 << 20, "cpu": 4 << 20}


def test_stripes_are_cut_for_its_links():
    machine = "2xrtx3090-pcie4x16-64gb-nvlink"
    module = large()
    step = estimated(module, machine)
    spec = "cuda:0,0b;cpu+cuda:1,*"
    found = distorch.predict(module, step, spec, machine=machine)
    parts = {name: use.bytes for name, use in found.links.items()}
    known = distorch.Machine.named(machine)
    wanted = link(known, "cuda:1").rate / link(known, "cpu").rate
    assert parts["cuda:1->cuda:0"] / parts["cpu->cuda:0"] == pytest.approx(wanted, rel=0.02)


def test_what_it_does_not_have_is_refused():
    module = large()
    step = estimated(module)
    for spec, match in {
        "cuda:1,1gb;cpu,*": f"'cuda:1' is not there; the machine '{NAME}' has",
        "cuda:0,0b;cuda:1,*": "cuda:1",
        "cuda:0,30gb;cpu,*": "30",
        "cpu,1gb;disk,*": "is not known of the machine|computes on",
    }.items():
        with pytest.raises((distorch.PlacementError, distorch.SpecError), match=match):
            distorch.predict(module, step, spec, machine=NAME, compute=spec.split(",")[0])


def test_a_step_is_of_one_speed():
    """Links do not matter to it, and the device that computes does."""
    module = large(2)
    step = estimated(module)
    spec = "cuda:0,0b;cpu,*"
    slower = distorch.predict(module, step, spec, machine="RTX3090-64gb-pcie3x8", prefetch="1mb")
    assert (
        slower.seconds > distorch.predict(module, step, spec, machine=NAME, prefetch="1mb").seconds
    )
    with pytest.raises(distorch.PlacementError, match=f"of '{NAME}', and 'rtx4090-"):
        distorch.predict(module, step, spec, machine="rtx4090-pcie4x16-64gb")
    with pytest.raises(distorch.SpecError, match="machine= needs a placement"):
        distorch.predict(module, step, machine=NAME)


def test_a_step_for_another_machine_is_refused_here(monkeypatch):
    module, machine = large(2), distorch.Machine.named(NAME)
    found = dataclasses.replace(
        machine.calibration,
        speeds=(dataclasses.replace(machine.calibration.speeds[0], device="sim:0"),),
        links=tuple(dataclasses.replace(k, compute="sim:0") for k in machine.calibration.links),
    )
    there = distorch.Machine("another", {"sim:0": 24 * GB, "cpu": 64 * GB}, found)
    step = estimated(module, there)
    distorch.calibrate(progress=False)
    with pytest.raises(distorch.PlacementError, match="of 'another', and this machine has"):
        distorch.predict(module, step, ALL_AWAY)
    with pytest.raises(distorch.PlacementError, match="of 'another', and this machine has"):
        distorch.plan(module, ALL_AWAY, order="optimal", step=step)
    with distorch.estimate_step(module, compute="sim:0") as here:
        module(torch.empty(16, 8192, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(distorch.PlacementError, match="of 'this machine', and 'another'"):
        distorch.predict(module, here, ALL_AWAY, machine=there)
    distorch.calibrate(progress=False)
    distorch.predict(module, here, ALL_AWAY)


def test_the_second_gpu_may_compute():
    machine, module = "2xrtx3090-pcie4x16-64gb", large(2)
    with torch.no_grad(), distorch.estimate_step(module, machine, compute="cuda:1") as step:
        module(torch.empty(16, 8192, dtype=torch.bfloat16, device="meta"))
    assert step.compute == "cuda:1"
    found = distorch.predict(
        module, step, "cuda:1,0b;cpu,*", machine=machine, compute="cuda:1", prefetch="1mb"
    )
    assert found.links.keys() == {"cpu->cuda:1"}


def test_a_step_keeps_its_machine(tmp_path):
    step = estimated(large(2))
    step.save(tmp_path / "step.json")
    assert distorch.Step.load(tmp_path / "step.json") == step


def test_a_distributed_module_is_predicted_for_another_machine():
    """It lies on this one, and computes here; neither counts."""
    module = chain(4, width=1024)
    distorch.distribute(module, ALL_AWAY, min_bytes=0)
    with distorch.estimate_step(module, NAME) as step:
        inference(module, there(512, 1024))()
    found = distorch.predict(
        module, step, "cuda:0,0b;cpu,*", machine=NAME, min_bytes=0, prefetch="6mb"
    )
    assert found.plan.compute == "cuda:0"
    assert found.links.keys() == {"cpu->cuda:0"}


def test_nobody_else_sees_the_other_machine():
    module, step = large(2), estimated(large(2))
    here = set(distorch.devices())
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(set(distorch.devices()))

    thread = threading.Thread(target=look)
    thread.start()
    for spec in ("cuda:0,0b;cpu,*", "cuda:9,0b;cpu,*") * 5:
        try:
            distorch.predict(module, step, spec, machine=NAME)
        except distorch.PlacementError:
            assert "cuda:9" in spec
        assert set(distorch.devices()) == here
    stop.set()
    thread.join()
    assert all(devices == here for devices in seen)
