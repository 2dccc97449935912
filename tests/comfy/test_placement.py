# SPDX-License-Identifier: Apache-2.0
"""The old inputs and strings as placements of ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.comfy.placement import (
    Placement,
    donors_for,
    expert_spec,
    old_placement,
    spec_problem,
)
from distorch.errors import PlacementError, SpecError
from distorch.planner import DeviceInfo, parse_spec

GB = 1 << 30
DEVICES = {
    name: DeviceInfo(name, total * GB, free * GB)
    for name, total, free in (
        ("cpu", 64, 48), ("disk", 500, 400), ("cuda:0", 24, 20), ("cuda:1", 12, 3),
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "ours"),
    [
        ("cuda:0,2.5gb;cpu,*", "cuda:0,2.5gb;cpu,*"),
        ("cuda:0,2.5g;cuda:1,3G;cpu,*", "cuda:0,2.5g;cuda:1,3g;cpu,*"),
        ("cuda:0,25%;cpu,75%", "cuda:0,25%;cpu,75%"),
        ("cuda:0,25;cpu,75%", "cuda:0,25%;cpu,75%"),
        ("cuda:0,0.4;cpu,0.3", "cuda:0,0.4;cpu,0.3"),
        ("cuda:0,1024;cpu,2gb", "cuda:0,1024b;cpu,2gb"),
        ("musa:0,1gb;cpu,*", "musa:0,1gb;cpu,*"),  # 'm' and 'k' in names are no units
        ("cuda:0,2tb;cpu,*", "cuda:0,2tb;cpu,*"),
        # The old pack's own examples, and what its parser made of the rest.
        ("cuda:0,500mb;cuda:1,3.0g;cpu,5gb*", "cuda:0,500mb;cuda:1,3.0g;cpu,*"),
        ("cuda:0,8%;cuda:1,8%;cpu,4%", "cuda:0,8%;cuda:1,8%;cpu,4%"),
        ("cpu,50%", "cpu,*"),
        ("cpu,5gb *", "cpu,*"),
        ("cuda:1,4gb;nonsense;cpu,*", "cuda:1,4gb;cpu,*"),
        ("cuda:1,1gb;cuda:1,2gb;cpu,*", "cuda:1,2gb;cpu,*"),
        ("cuda:0,10%;cpu,20%;cuda:0,30%", "cuda:0,30%;cpu,20%"),
        ("cpu,2gb;cuda:1,1gb;cpu,*", "cpu,*;cuda:1,1gb"),
        ("cuda:1,*;cpu,*", "cpu,*"),
        ("cuda:1,4g", "cuda:1,4g"),
        ("auto", "auto"),
        ("cpu+cuda:1,2gb;disk,*", "cpu+cuda:1,2gb;disk,*"),
        ("cuda:0,40%;cpu,*", "cuda:0,40%;cpu,*"),
    ],
)
def test_expert_strings(old, ours):
    assert expert_spec(old) == ours


def test_shares_of_memory_leave_the_rest_on_the_compute_device():
    assert expert_spec("cuda:0,0.1;cpu,0.5", "cuda:0") == "cuda:0,*;cpu,0.5"
    assert expert_spec("cpu,0.25", "cuda:0") == "cuda:0,*;cpu,0.25"
    found = old_placement("cuda:0", 4.0, "cpu", "cpu,0.25;cuda:1,0.5", DEVICES)
    assert found == Placement("cuda:0,*;cpu,0.25;cuda:1,0.5", "cuda:0")


@pytest.mark.parametrize("text", ["cuda:0", "cuda:0,5;cpu,*", "cuda:0,2qb", "nonsense"])
def test_expert_strings_that_mean_nothing(text):
    with pytest.raises(SpecError):
        expert_spec(text)


def test_virtual_vram():
    found = old_placement("cuda:0", 4.0, "cpu", "", DEVICES)
    assert found == Placement(f"cuda:0,*;cpu,{4 * GB}b", "cuda:0")
    assert old_placement("cuda:0", 0.0, "cpu", "", DEVICES) is None
    assert old_placement("cpu", 4.0, "cpu", "", DEVICES) is None  # compute and donor are one


def test_an_expert_string_wins_over_virtual_vram():
    found = old_placement("cuda:0", 4.0, "cpu", "cuda:0,1gb;cpu,*", DEVICES)
    assert found == Placement("cuda:0,1gb;cpu,*", "cuda:0")


def test_other_vram_is_filled_as_far_as_it_is_free():
    found = old_placement("cuda:0", 10.0, "cpu", "", DEVICES, other_vram=True)
    assert found.spec == f"cuda:0,*;cuda:1,{3 * GB}b;cpu,{7 * GB}b"


def test_donors_are_named_once_and_never_the_compute_device():
    assert donors_for("cpu", "cuda:0", ["cuda:0", "cuda:1", "cpu"]) == "cuda:1,cpu"


@given(st.floats(0.1, 128.0), st.sampled_from(["cpu", "cuda:1", "disk"]))
def test_every_old_amount_parses_and_gives_what_it_says(amount, donor):
    found = old_placement("cuda:0", amount, donor, "", DEVICES)
    given_away = sum(
        entry.share.nbytes for entry in parse_spec(found.spec).entries if entry.device != "cuda:0"
    )
    assert given_away == int(amount * GB)


def test_problems_name_the_entry():
    assert spec_problem("auto", DEVICES) is None
    assert spec_problem("", DEVICES, old=True) is None
    assert "empty" in spec_problem("", DEVICES)
    found = spec_problem("cuda:0,1gb;cuda:5,*", DEVICES)
    assert "entry 2" in found
    assert "cuda:5" in found


def test_small_tensors_stay_by_share_of_the_model():
    placement = Placement("cuda:0,*", "cuda:0")
    assert placement.options(100 << 20)["min_bytes"] == int((100 << 20) * 1e-4)
    assert placement.options(100 << 30)["min_bytes"] == 1 << 20


def test_a_clone_on_another_device():
    placement = Placement("cuda:0,2gb;cpu,*", "cuda:0")
    assert placement.on("cuda:0") is placement
    assert placement.on("cuda:1") == Placement("cuda:1,2gb;cpu,*", "cuda:1")
    with pytest.raises(PlacementError, match="donor"):
        Placement("cuda:0,2gb;cuda:1,*", "cuda:0").on("cuda:1")
