# SPDX-License-Identifier: Apache-2.0
"""Plans: exact, never over budget, deterministic, evenly spread."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.errors import FormatError, PlacementError, SpecError
from distorch.planner import (
    DeviceInfo,
    Inventory,
    Plan,
    WeightInfo,
    make_plan,
    virtual_vram_spec,
)

G, M = 1 << 30, 1 << 20
DEVICES = {
    name: DeviceInfo(name, total, free)
    for name, total, free in [
        ("cuda:0", 24 * G, 20 * G), ("cuda:1", 24 * G, 24 * G), ("cpu", 64 * G, 60 * G),
        ("disk", 500 * G, 400 * G),
    ]
}  # fmt: skip


def weights(*sizes, shape=(2, 2)):
    return tuple(WeightInfo(f"w{i}", size, shape, "bfloat16") for i, size in enumerate(sizes))


def make(sizes, spec, compute="cuda:0", **options):
    inventory = Inventory(weights(*sizes))
    return make_plan(inventory, spec, compute=compute, devices=DEVICES, **options)


def test_weights_in_their_own_file_take_no_room_on_a_disk():
    own = Inventory(tuple(replace(w, in_file=True) for w in weights(*[300 * G] * 3)))
    made = make_plan(own, "cuda:0,0b;disk,*", compute="cuda:0", devices=DEVICES)
    assert made.bytes == {"cuda:0": 0, "disk": 900 * G}
    with pytest.raises(PlacementError, match=r"600.00 GiB\) on disk, which has"):
        make_plan(own.in_files(["w0"]), "cuda:0,0b;disk,*", compute="cuda:0", devices=DEVICES)
    with pytest.raises(PlacementError, match="on cpu, which has"):
        make_plan(own, "cuda:0,0b;cpu,*", compute="cuda:0", devices=DEVICES)


def test_bytes_are_exact():
    plan = make([64 * M] * 100, "cuda:0,2.5gb;cpu,*")
    assert plan.bytes == {"cuda:0": 40 * 64 * M, "cpu": 60 * 64 * M}


def test_sequential_keeps_the_order():
    plan = make([10 * M] * 10, "cuda:0,30mb;cuda:1,45mb;cpu,*", order="sequential")
    assert list(plan.placement.values()) == ["cuda:0"] * 3 + ["cuda:1"] * 4 + ["cpu"] * 3


def test_sequential_with_the_rest_first():
    plan = make([10 * M] * 10, "cuda:0,*;cpu,30mb", order="sequential")
    assert list(plan.placement.values()) == ["cuda:0"] * 7 + ["cpu"] * 3


def test_ratio():
    for spec in ("cuda:0,25%;cpu,75%", "cuda:0,1%;cpu,3%"):
        assert make([10 * M] * 100, spec).bytes == {"cuda:0": 250 * M, "cpu": 750 * M}


def test_percentage_of_the_model_beside_bytes():
    plan = make([10 * M] * 100, "cuda:0,100mb;cuda:1,30%;cpu,*")
    assert plan.bytes == {"cuda:0": 100 * M, "cuda:1": 300 * M, "cpu": 600 * M}


def test_fraction_of_the_device():
    plan = make([64 * M] * 200, "cuda:0,0.25;cpu,*")
    assert plan.bytes["cuda:0"] == 6 * G


def test_rest_goes_to_cpu():
    assert make([10 * M] * 10, "cuda:0,50mb").bytes == {"cuda:0": 50 * M, "cpu": 50 * M}


def test_compute_missing_streams_everything():
    plan = make([10 * M] * 4, "cpu,*")
    assert plan.bytes == {"cuda:0": 0, "cpu": 40 * M}


def test_floor_stays_and_counts_first():
    inventory = Inventory(
        (
            WeightInfo("norm", 3 * M, (100,), "float32"),
            WeightInfo("small", M // 2, (4, 4), "float32"),
            WeightInfo("ids", 8 * M, (4, 4), "int64", floating=False),
            WeightInfo("buffer", M, (4, 4), "float32", kind="buffer"),
            *weights(*[10 * M] * 4),
        )
    )
    plan = make_plan(inventory, "cuda:0,33mb;cpu,*", compute="cuda:0", devices=DEVICES)
    assert plan.floor == 12 * M + M // 2
    assert plan.bytes == {"cuda:0": plan.floor + 20 * M, "cpu": 20 * M}
    plan = make_plan(inventory, "cuda:0,0b;cpu,*", compute="cuda:0", devices=DEVICES)
    assert plan.bytes["cuda:0"] == plan.floor
    plan = make_plan(inventory, "cuda:0,0b;cpu,*", compute="cuda:0", devices=DEVICES, min_bytes=0)
    assert plan.floor == 9 * M


def test_keep_offload_rules():
    plan = make(
        [10 * M] * 6, "cuda:0,20mb;cuda:1,20mb;cpu,*",
        keep=["w5"], offload=["w0"], rules=[("w1", "cpu")],
    )  # fmt: skip
    assert plan.placement["w5"] == "cuda:0"
    assert plan.placement["w0"] == "cuda:1"
    assert plan.placement["w1"] == "cpu"
    assert plan.bytes["cuda:0"] == 20 * M


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("cuda:2,1gb;cpu,*", {}, "device 'cuda:2' is not there; this machine has cpu, cuda:0"),
        ("cuda:0,25gb;cpu,*", {}, "holds"),
        ("cuda:0,1gb;cpu,*", {"keep": ["nope*"]}, "keep pattern 'nope*' matches no weight"),
        ("cuda:0,1gb;cpu,*", {"keep": ["w0"], "offload": ["w*"]}, "choose one"),
        ("cuda:0,1gb;cpu,*", {"rules": [("w0", "disk")]}, "does not name"),
        ("cuda:0,1gb;cpu,1mb", {}, "have no place"),
        ("cuda:0,1gb;cpu,*", {"compute": "cuda:7"}, "is not there"),
    ],
)
def test_what_cannot_be_honoured(spec, options, message):
    with pytest.raises(PlacementError) as caught:
        make([1500 * M] * 2, spec, **options)
    assert message in str(caught.value)


def test_model_that_does_not_fit():
    with pytest.raises(PlacementError, match="add ';disk,\\*'"):
        make([10 * G] * 8, "cuda:0,10gb;cpu,*")


def test_auto_prefers_the_compute_device():
    assert make([G] * 4, "auto").bytes == {"cuda:0": 4 * G}
    plan = make([G] * 30, "auto", reserve_bytes=2 * G)
    assert plan.bytes == {"cuda:0": 18 * G, "cpu": 12 * G}
    plan = make([G] * 90, "auto")
    assert plan.bytes == {"cuda:0": 20 * G, "cpu": 60 * G, "disk": 10 * G}


def test_virtual_vram():
    spec = virtual_vram_spec("4gb", "cuda:1,cpu", "cuda:0", DEVICES)
    assert make([G] * 10, spec).bytes == {"cuda:0": 6 * G, "cuda:1": 4 * G}
    spec = virtual_vram_spec("30gb", "cuda:1,cpu", "cuda:0", DEVICES)
    assert make([G] * 40, spec).bytes == {"cuda:0": 10 * G, "cuda:1": 24 * G, "cpu": 6 * G}
    with pytest.raises(SpecError, match="compute device itself"):
        virtual_vram_spec("1gb", "cuda:0", "cuda:0", DEVICES)


def test_tied_weights_move_together():
    tied = WeightInfo("embed", 10 * M, (4, 4), "float32", aliases=("head",))
    inventory = Inventory((tied, *weights(10 * M)))
    plan = make_plan(inventory, "cuda:0,10mb;cpu,*", compute="cuda:0", devices=DEVICES)
    assert plan.placement["embed"] == plan.placement["head"]
    assert plan.total_bytes == 20 * M


@given(n=st.integers(1, 60), data=st.data())
def test_equal_weights_are_spread_evenly(n, data):
    k = data.draw(st.integers(0, n))
    extra = data.draw(st.integers(0, M - 1))
    plan = make([M] * n, f"cuda:0,{k * M + (extra if k < n else 0)}b;cpu,*")
    stay = [i for i in range(n) if plan.placement[f"w{i}"] == "cuda:0"]
    assert len(stay) == k
    gaps = {b - a for a, b in zip(stay, stay[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


SIZES = st.lists(st.integers(M, 40 * M), min_size=1, max_size=40)
SHARES = st.integers(0, 500 * M)


@given(
    sizes=SIZES, first=SHARES, second=SHARES, order=st.sampled_from(["interleaved", "sequential"])
)
def test_budgets_hold_and_are_used(sizes, first, second, order):
    plan = make(sizes, f"cuda:0,{first}b;cuda:1,{second}b;cpu,*", order=order)
    used = plan.bytes
    assert sum(used.values()) == sum(sizes)
    for position, (device, budget) in enumerate([("cuda:0", first), ("cuda:1", second)]):
        left = budget - used.get(device, 0)
        assert left >= 0
        later = [
            size for i, size in enumerate(sizes)
            if plan.placement[f"w{i}"] in ("cuda:0", "cuda:1", "cpu")[position + 1 :]
        ]  # fmt: skip
        next_one = later[:1] if order == "sequential" else later
        assert all(size > left for size in next_one)
    assert plan.hash == make(sizes, plan.spec, order=order).hash


@given(sizes=SIZES, share=SHARES, more=SHARES)
def test_more_budget_never_means_fewer_resident_bytes_than_one_weight(sizes, share, more):
    small = make(sizes, f"cuda:0,{share}b;cpu,*").bytes["cuda:0"]
    large = make(sizes, f"cuda:0,{share + more}b;cpu,*").bytes["cuda:0"]
    assert large >= small or share + more - large < max(sizes)
    assert large >= min(sum(sizes), share + more) - max(sizes)


def test_save_load_diff(tmp_path):
    plan = make([10 * M] * 4, "cuda:0,20mb;cpu,*")
    plan.save(tmp_path / "p.json")
    again = Plan.load(tmp_path / "p.json")
    assert again == plan
    assert again.hash == plan.hash
    assert not plan.diff(again)
    other = make([10 * M] * 4, "cuda:0,30mb;cpu,*")
    diff = plan.diff(other)
    assert sum(nbytes for _, _, _, nbytes in diff.moves) == 10 * M or len(diff) == 3
    assert all(a != b for _, a, b, _ in diff.moves)
    assert "weight" in str(diff)
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"version": 9}', "nothing"])
def test_damaged_plan_files(tmp_path, damage):
    path = tmp_path / "p.json"
    path.write_text(damage)
    with pytest.raises(FormatError, match=r"p\.json"):
        Plan.load(path)


def test_edited_plan_is_refused(tmp_path):
    plan = make([10 * M] * 4, "cuda:0,20mb;cpu,*")
    plan.save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text().replace('"w0": "cpu"', '"w0": "cuda:0"', 1)
    text = text.replace('"w1": "cpu"', '"w1": "cuda:0"', 1)
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(FormatError, match="hash"):
        Plan.load(tmp_path / "p.json")


def test_prints_as_table_and_html():
    plan = make([10 * M] * 4, "cuda:0,20mb;cpu,*")
    assert "cuda:0 (compute)" in str(plan)
    assert "<table>" in plan._repr_html_()
