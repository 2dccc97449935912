# SPDX-License-Identifier: Apache-2.0
"""Specs that are offered for a machine."""

import pytest

from distorch.planner import DeviceInfo, parse_spec

GB = 1 << 30


def devices(*gpus, ram=64, disk=True):
    found = {f"cuda:{i}": DeviceInfo(f"cuda:{i}", n * GB, n * GB) for i, n in enumerate(gpus)}
    for name, total in (("cpu", ram), *([("disk", 1000)] if disk else [])):
        found[name] = DeviceInfo(name, total * GB, total * GB)
    return found


@pytest.fixture
def machine(host, monkeypatch):
    """A machine of our choice. The host says that sampling takes a GB."""
    from distorch.comfy import host as adapter

    def of(*gpus, computes=None, sampling=GB, **other):
        first = computes or ("cuda:0" if gpus else "cpu")
        monkeypatch.setattr(adapter, "devices", lambda: devices(*gpus, **other))
        monkeypatch.setattr(adapter, "default_device", lambda: first)
        monkeypatch.setattr(adapter, "sampling_memory", lambda *_: sampling)

    return of


MACHINES = (
    ((), {"ram": 16}), ((8,), {"ram": 16}), ((24,), {"ram": 16}), ((24, 8), {"ram": 64}),
    ((8, 24), {"ram": 128, "computes": "cuda:1"}), ((2,), {"ram": 4}), ((80,) * 4, {"ram": 512}),
    ((8,), {"ram": 32, "disk": False}), ((), {"ram": 8, "disk": False}),
)  # fmt: skip


@pytest.fixture(params=MACHINES, ids=str)
def any_machine(machine, request):
    gpus, other = request.param
    machine(*gpus, **other)
    return other


def test_every_preset_is_a_spec_for_this_machine(any_machine):
    from distorch.comfy import host as adapter
    from distorch.comfy import own_nodes
    from distorch.comfy.placement import spec_problem

    for node in own_nodes.NODES.values():
        offered = node.presets() if hasattr(node, "presets") else {}
        for title, spec in offered.items():
            assert spec_problem(spec, adapter.devices()) is None, title
            for entry in parse_spec(spec).entries:
                assert entry.device in title or entry.device in ("cpu", "disk"), title


def test_ram_has_room_for_what_comes_back_to_it(any_machine):
    """The plan of a file of that size: at rest its accelerators' shares are in RAM."""
    from distorch.comfy.presets import FAMILIES, for_models

    for title, spec in for_models().items():
        (family,) = [family for family in FAMILIES if title.startswith(family.title)]
        entries = {entry.device: entry.text.partition(",")[2] for entry in parse_spec(spec).entries}
        whole = family.gb * 1e9
        at_rest = whole
        if "disk" in entries:
            sizes = [float(text.removesuffix("gb").removesuffix("b")) * GB
                     for name, text in entries.items() if name != "disk"]  # fmt: skip
            at_rest = min(whole, sum(sizes))
        assert family.count * at_rest <= 0.75 * any_machine["ram"] * GB, title


def test_flux_on_a_small_card(machine):
    from distorch.comfy.presets import for_models

    machine(8, ram=64)
    # nine tenths of 8 GB, without 1 GB for sampling and a ring of 0.25 GB
    assert for_models()["FLUX.1, 1024x1024, on cuda:0 (8 GB)"] == "cuda:0,5.9gb;cpu,*"


def test_little_ram_leaves_the_rest_on_disk(machine):
    from distorch.comfy.presets import for_models

    machine(8, ram=16)
    found = for_models()
    assert found["FLUX.1, 1024x1024, on cuda:0 (8 GB)"] == "cuda:0,5.9gb;cpu,6gb;disk,*"
    assert found["SDXL, 1024x1024, on cuda:0 (8 GB)"] == "cuda:0,6gb;cpu,*"


def test_a_workflow_with_two_models_has_half_of_the_ram_for_each(machine):
    from distorch.comfy.presets import for_models

    machine(24, ram=64)
    found = for_models()["Wan 2.2 14B, 832x480, 81 frames, on cuda:0 (24 GB)"]
    assert found == "cuda:0,20.3gb;cpu,3.6gb;disk,*"


def test_other_gpus_are_donors(machine):
    from distorch.comfy.presets import for_models

    machine(8, 24, ram=64)
    found = for_models()
    title = "FLUX.1, 1024x1024, on cuda:0 (8 GB)"
    assert found[f"{title} and cuda:1"] == "cuda:0,5.9gb;cuda:1,21.5gb;cpu,*"
    assert not any(title.partition(" on ")[2].startswith("cuda:1") for title in found)


def test_a_device_that_the_host_computes_on(machine):
    from distorch.comfy.presets import for_models, general

    machine(8, 24, ram=64, computes="cuda:1")
    assert "FLUX.1, 1024x1024, on cuda:1 (24 GB)" in for_models()
    assert "Half on cuda:1, half in RAM" in general()


def test_a_card_that_is_too_small_for_the_sampling_has_none(machine):
    from distorch.comfy.presets import for_models

    machine(8, ram=64, sampling=8 * GB)
    assert for_models() == {}


def test_without_a_gpu_there_is_ram_and_disk(machine):
    from distorch.comfy.presets import for_models, general

    machine(ram=32)
    assert list(general().values()) == ["auto", "cpu,24gb;disk,*"]
    assert for_models() == {}
    machine(ram=32, disk=False)
    assert list(general().values()) == ["auto"]


def test_a_host_that_knows_no_such_model_offers_none(host):
    from distorch.comfy import host as adapter

    assert adapter.sampling_memory("Flux", {}, (1, 16, 128, 128)) is None  # the stand-in
