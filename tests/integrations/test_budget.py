# SPDX-License-Identifier: Apache-2.0
"""One budget for several modules: no device gets more than its entry, whatever the parts are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distorch.errors import PlacementError
from distorch.integrations.budget import by_use, plan_together
from distorch.planner import DeviceInfo, Inventory, WeightInfo
from distorch.runtime.options import Options

GB = 1 << 30
DEVICES = {name: DeviceInfo(name, 64 * GB, 64 * GB) for name in ("cpu", "disk", "cuda:0", "cuda:1")}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """GPUs that are not there: planning needs none."""
    monkeypatch.setattr("distorch.machine.machine.with_exact", lambda devices, names: DEVICES)


def weights(sizes, kind="parameter"):
    return [
        WeightInfo(f"{kind}.{i}", n, (1, n), "uint8", kind=kind, floating=kind == "parameter")
        for i, n in enumerate(sizes)
    ]


def part(*sizes, buffers=()):
    return Inventory((*weights(sizes), *weights(buffers, "buffer")))


def together(parts, spec, **options):
    chosen = Options(**{"min_bytes": 0, "compute": "cuda:0", **options})
    return plan_together(parts, spec, chosen, DEVICES)


def held(own):
    found = {}
    for plan in own.values():
        for device, nbytes in plan.bytes.items():
            found[device] = found.get(device, 0) + nbytes
    return found


SIZES = st.lists(st.integers(1, 900), min_size=1, max_size=12)
PARTS = st.dictionaries(
    st.sampled_from(["transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2"]),
    st.builds(lambda s, b: part(*s, buffers=b), SIZES, st.lists(st.integers(1, 20), max_size=2)),
    min_size=1,
)


@settings(max_examples=300, deadline=None)
@given(
    parts=PARTS, gpu=st.integers(100, 4000), ram=st.integers(0, 4000),
    order=st.sampled_from(["interleaved", "sequential"]),
    text=st.sampled_from(["cuda:0,{gpu}b;cpu,{ram}b;disk,*", "disk,*;cpu,{ram}b;cuda:0,{gpu}b",
                          "cuda:0,{gpu}b;cpu+cuda:1,{ram}b;disk,*", "cpu,{ram}b;cuda:0,*",
                          "cuda:0,{gpu}b;cpu,*;disk,{ram}b"]),
)  # fmt: skip
def test_no_device_gets_more_than_its_entry(parts, gpu, ram, order, text):
    common, own = together(parts, text.format(gpu=gpu, ram=ram), order=order)
    found, total = held(own), sum(inventory.total_bytes for inventory in parts.values())
    assert sum(found.values()) == total == common.total_bytes
    assert {d: n for d, n in found.items() if n} == {d: n for d, n in common.bytes.items() if n}
    shares = {"cuda:0": gpu, "cpu": ram, "disk": ram, "cpu+cuda:1": ram}
    for entry in text.split(";"):
        device, share = entry.split(",")
        if share != "*":
            floor = common.floor if device == "cuda:0" else 0
            assert found.get(device, 0) <= max(shares[device], floor)
    assert bool(common.over_budget()) == ("{gpu}" in text and common.floor > gpu)
    for name, plan in own.items():
        for weight in parts[name].weights:
            assert common.placement[f"{name}.{weight.name}"] == plan.placement[weight.name]


def test_what_runs_at_every_step_gets_the_fast_places():
    parts = {
        "text_encoder": part(*[10] * 10),
        "vae": part(*[10] * 10),
        "transformer": part(*[10] * 10),
    }
    _, own = together(parts, "disk,*;cpu,100b;cuda:0,60b")
    assert own["transformer"].bytes == {"cuda:0": 60, "cpu": 40}
    assert own["vae"].bytes == {"cuda:0": 0, "cpu": 60, "disk": 40}
    assert own["text_encoder"].bytes == {"cuda:0": 0, "disk": 100}
    # Within a part, evenly.
    homes = [own["transformer"].placement[f"parameter.{i}"] for i in range(10)]
    assert homes != sorted(homes)


def test_ratios_are_of_all_parts():
    parts = {"text_encoder": part(*[10] * 10), "unet": part(*[10] * 10)}
    common, own = together(parts, "cuda:0,25%;cpu,75%")
    assert common.bytes == {"cuda:0": 50, "cpu": 150}
    assert own["unet"].bytes["cuda:0"] == 50


def test_patterns_of_one_part_and_of_all():
    parts = {"text_encoder": part(10, 20), "unet": part(30, 40)}
    options = {"keep": ["text_encoder.*"], "offload": ["*parameter.1"]}
    with pytest.raises(
        PlacementError, match="'text_encoder.parameter.1' is matched by keep and by"
    ):
        together(parts, "cuda:0,*;cpu,100b", **options)
    options = {"keep": ["text_encoder.*"], "rules": [("unet.*.1", "disk")]}
    common, own = together(parts, "cuda:0,50b;cpu,*;disk,40b", **options)
    assert own["text_encoder"].bytes == {"cuda:0": 30}
    assert own["text_encoder"].options["keep"] == ["*"]
    assert own["text_encoder"].options["rules"] == []
    assert own["unet"].placement["parameter.1"] == "disk"
    assert own["unet"].options["rules"] == [["*.1", "disk"]]
    assert common.placement["unet.parameter.1"] == "disk"


def test_patterns_that_begin_in_the_middle_of_a_parts_name():
    parts = {"text_encoder": part(10, 20), "unet": part(30, 40)}
    for pattern in ("text_encoder*", "te?t_encoder.*", "*encoder*", "t*.parameter.?"):
        common, own = together(parts, "cuda:0,*;cpu,100b", offload=[pattern])
        assert own["text_encoder"].bytes == {"cuda:0": 0, "cpu": 30}
        assert {common.placement[f"text_encoder.parameter.{i}"] for i in (0, 1)} == {"cpu"}
        common, own = together(parts, "cuda:0,*;cpu,100b;disk,0b", rules=[(pattern, "cpu")])
        assert own["text_encoder"].bytes["cpu"] == 30
    odd = Inventory(
        (WeightInfo("a[0].*", 10, (1, 10), "uint8"), WeightInfo("a0.x", 10, (1, 10), "uint8"))
    )
    _, own = together({"unet": odd}, "cuda:0,*;cpu,10b", offload=["*.a[[]0].[*]"])
    assert own["unet"].placement == {"a[0].*": "cpu", "a0.x": "cuda:0"}


def test_a_part_larger_than_the_device(monkeypatch):
    small = {**DEVICES, "cuda:0": DeviceInfo("cuda:0", 64, 64)}
    monkeypatch.setattr("distorch.machine.machine.with_exact", lambda devices, names: small)
    for order in ("interleaved", "sequential"):
        _, own = plan_together(
            {"transformer": part(*[10] * 10), "vae": part(30)}, "cuda:0,50b;cpu,*",
            Options(min_bytes=0, compute="cuda:0", order=order), small,
        )  # fmt: skip
        assert own["transformer"].bytes == {"cuda:0": 50, "cpu": 50}
        _, own = plan_together(
            {"transformer": part(*[10] * 10), "vae": part(30)}, "auto",
            Options(min_bytes=0, compute="cuda:0", order=order), small,
        )  # fmt: skip
        assert own["transformer"].bytes == {"cuda:0": 50, "cpu": 50}  # 20 % is left for activations


def test_the_order_of_use():
    names = ["vae", "text_encoder", "safety_checker", "unet", "transformer_2", "image_encoder"]
    assert by_use(names)[:2] == ["unet", "transformer_2"]
    assert by_use(names)[2] == "vae"
    assert by_use(["controlnet", "motion_adapter", "text_encoder", "unet", "vae"])[0] == "unet"
