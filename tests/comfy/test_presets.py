# SPDX-License-Identifier: Apache-2.0
"""Specs that are offered for a machine."""

import pytest

from distorch.planner import DeviceInfo, parse_spec

GB = 1 << 30


def devices(*gpus, ram=64):
    found = {f"cuda:{i}": DeviceInfo(f"cuda:{i}", n * GB, n * GB) for i, n in enumerate(gpus)}
    for name, total in (("cpu", ram), ("disk", 1000)):
        found[name] = DeviceInfo(name, total * GB, total * GB)
    return found


@pytest.fixture
def machine(host, monkeypatch):
    """A machine of our choice. The host says that sampling takes a GB."""
    from distorch.comfy import host as adapter

    def of(*gpus, ram=64):
        monkeypatch.setattr(adapter, "devices", lambda: devices(*gpus, ram=ram))
        monkeypatch.setattr(adapter, "sampling_memory", lambda *_: GB)

    return of


def test_every_preset_is_a_spec_for_this_machine(machine):
    from distorch.comfy import host as adapter
    from distorch.comfy import own_nodes
    from distorch.comfy.placement import spec_problem

    for gpus, ram in (((), 16), ((8,), 16), ((24, 8), 64), ((1,), 4)):
        machine(*gpus, ram=ram)
        for node in own_nodes.NODES.values():
            offered = node.presets() if hasattr(node, "presets") else {}
            for title, spec in offered.items():
                assert spec_problem(spec, adapter.devices()) is None, title
                assert all(entry.device in title or entry.device in ("cpu", "disk")
                           for entry in parse_spec(spec).entries), title  # fmt: skip


def test_flux_on_a_small_card(machine):
    from distorch.comfy.presets import for_models

    machine(8, ram=64)
    # 8 GB without 1 GB for sampling and a ring of 0.25 GB
    assert for_models()["FLUX.1, 1024x1024, on cuda:0 (8 GB)"] == "cuda:0,6.7gb;cpu,*"


def test_little_ram_leaves_the_rest_on_disk(machine):
    from distorch.comfy.presets import for_models

    machine(8, ram=16)
    found = for_models()
    assert found["FLUX.1, 1024x1024, on cuda:0 (8 GB)"] == "cuda:0,6.7gb;cpu,12gb;disk,*"
    assert found["SDXL, 1024x1024, on cuda:0 (8 GB)"] == "cuda:0,6.8gb;cpu,*"


def test_other_gpus_are_donors(machine):
    from distorch.comfy.presets import for_models

    machine(8, 24, ram=16)
    found = for_models()
    title = "FLUX.1, 1024x1024, on cuda:0 (8 GB)"
    assert found[f"{title} and cuda:1"] == "cuda:0,6.7gb;cuda:1,21.5gb;cpu,*"
    assert found["FLUX.1, 1024x1024, on cuda:1 (24 GB)"].startswith("cuda:1,22.7gb;")


def test_a_card_that_is_too_small_keeps_nothing(machine):
    from distorch.comfy.presets import for_models

    machine(1, ram=64)
    assert for_models()["FLUX.1, 1024x1024, on cuda:0 (1 GB)"] == "cuda:0,0b;cpu,*"


def test_without_a_gpu_there_is_ram_and_disk(machine):
    from distorch.comfy.presets import for_models, general

    machine(ram=32)
    assert list(general().values()) == ["auto", "cpu,24gb;disk,*"]
    assert for_models() == {}


def test_a_host_that_knows_no_such_model_offers_none(host):
    from distorch.comfy import host as adapter

    assert adapter.sampling_memory("Flux", {}, (1, 16, 128, 128)) is None  # the stand-in
