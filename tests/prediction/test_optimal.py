# SPDX-License-Identifier: Apache-2.0
"""`order="optimal"`: within its shares, never worse, as good as brute force, and lasting."""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

import distorch
from distorch.errors import PlacementError, SpecError
from distorch.machine.links import Calibration, Link, Speed
from distorch.planner import DeviceInfo, Inventory, WeightInfo, make_plan
from tests.prediction.programs import (
    ALL_AWAY,
    DTYPE,
    MB,
    Albert,
    agrees,
    chain,
    configure,
    inference,
    linear,
    measure,
    ready,
    record,
    resident,
    there,
)

ANYWHERE = "sim:0,1tb;cpu,1tb;sim:1,1tb"  # nobody is short of room: rules alone decide


class Layers(nn.Module):
    """Linears (tokens, inputs, outputs) one after the other, each on so many tokens."""

    def __init__(self, layers):
        super().__init__()
        self.tokens = [tokens for tokens, _, _ in layers]
        self.layers = nn.ModuleList(linear(i, o) for _, i, o in layers)

    def forward(self, x):
        for tokens, layer in zip(self.tokens, self.layers, strict=True):
            layer(x.new_empty(tokens, layer.in_features, dtype=DTYPE))
        return x


def two_donors():
    configure(devices=2, links={("sim:1", "sim:0"): (3e9, 30e-6)})


def step_of(module, *inputs):
    distorch.calibrate(progress=False)
    run = inference(resident(module), *(inputs or (there(1),)))
    run()
    return record(module, run)


def sizes_of(module):
    return {name: parameter.nbytes for name, parameter in module.named_parameters()}


def placed(module, step, where, **options):
    """The prediction with weights exactly there."""
    devices = ";".join(f"{device},1tb" for device in distorch.devices() if device != "disk")
    return distorch.predict(module, step, devices, rules=list(where.items()), **options)


def both(module, step, spec, **options):
    """Predicted optimal, and interleaved."""
    return tuple(
        distorch.predict(module, step, spec, order=order, **options)
        for order in ("optimal", "interleaved")
    )


UNEVEN = (
    ([(16, 2048, 2048)] * 10 + [(16384, 512, 512)] * 30, "sim:0,70%;cpu,*", "9mb"),
    ([(16, 2048, 2048)] * 8 + [(8192, 1024, 1024)] * 32, "sim:0,50%;cpu,*", "17mb"),
    ([(64, 2048, 2048)] * 12 + [(16384, 1024, 1024)] * 12, "sim:0,60%;cpu,*", "9mb"),
)


@pytest.mark.parametrize(("layers", "spec", "ring"), UNEVEN)
def test_uneven_models_gain_and_are_measured_so(layers, spec, ring):
    module = Layers(layers)
    step = step_of(module)
    found, usual = both(module, step, spec, min_bytes=0, prefetch=ring)
    assert found.seconds <= 0.9 * usual.seconds
    assert found.bound_seconds <= found.seconds
    distorch.redistribute(module, spec, order="optimal", step=step, min_bytes=0, prefetch=ring)
    agrees(found, measure(inference(module, there(1))))


@pytest.mark.parametrize("ring", [0, "5mb", "9mb", "32mb"])
def test_brute_force_finds_nothing_better(ring):
    layers = [
        (16, 1024, 1024), (8192, 512, 512), (16, 1024, 2048), (4096, 512, 512),
        (256, 1024, 512), (4096, 512, 1024), (16, 2048, 512),
    ]  # fmt: skip
    module = Layers(layers)
    step, sizes = step_of(module), sizes_of(module)
    options = {"prefetch": ring, "min_bytes": 0}
    every = []
    for away in itertools.product((False, True), repeat=len(layers)):
        where = {n: "cpu" if gone else "sim:0" for n, gone in zip(sizes, away, strict=True)}
        stays = sum(n for n, gone in zip(sizes.values(), away, strict=True) if not gone)
        every.append((stays, placed(module, step, where, **options).seconds))
    total = sum(sizes.values())
    for room in (0, total // 5, total // 2, total * 3 // 4, total - 1, total):
        best = min(seconds for stays, seconds in every if stays <= room)
        found = distorch.predict(module, step, f"sim:0,{room}b;cpu,*", order="optimal", **options)
        assert found.plan.bytes["sim:0"] <= room
        assert found.seconds <= best * 1.01
        assert found.bound_seconds <= best * 1.001
        assert found.gap == pytest.approx(found.seconds / found.bound_seconds - 1)


def test_brute_force_with_two_donors():
    two_donors()
    layers = [
        (4096, 1024, 512),
        (16, 1024, 2048),
        (16, 2048, 1024),
        (8192, 512, 512),
        (64, 1024, 1024),
    ]
    module = Layers(layers)
    step, sizes = step_of(module), sizes_of(module)
    options = {"prefetch": "5mb", "min_bytes": 0}
    devices = ("sim:0", "cpu", "sim:1")
    every = {
        where: placed(module, step, dict(zip(sizes, where, strict=True)), **options).seconds
        for where in itertools.product(devices, repeat=len(layers))
    }
    total = sum(sizes.values())
    for stay, ram in itertools.product((0, total // 3, total // 2), (0, total // 3, total)):
        spec = f"sim:0,{stay}b;cpu,{ram}b;sim:1,*"
        room = {"sim:0": stay, "cpu": ram, "sim:1": total}
        best = min(
            seconds
            for where, seconds in every.items()
            if all(
                sum(n for n, at in zip(sizes.values(), where, strict=True) if at == device) <= most
                for device, most in room.items()
            )
        )
        found = distorch.predict(module, step, spec, order="optimal", **options)
        assert all(found.plan.bytes.get(device, 0) <= most for device, most in room.items())
        assert found.seconds <= best * 1.01, spec
        assert found.bound_seconds <= best * 1.001, spec


@pytest.mark.parametrize("seed", range(12))
def test_within_its_shares_and_never_worse(seed):
    rng = random.Random(seed)
    configure(
        devices=3,
        links={("sim:1", "sim:0"): (20e9, 1e-5), ("sim:2", "sim:0"): (3e9, 1e-5)},
        shared=[{("cpu", "sim:0"), ("sim:2", "sim:0")}] if seed % 4 == 0 else [],
    )
    widths = [rng.choice((130, 257, 511, 700, 1023, 1500)) for _ in range(rng.randint(3, 24))]
    module = Layers([(rng.choice((1, 64, 4096)), w, rng.choice(widths)) for w in widths])
    step, sizes = step_of(module), sizes_of(module)
    total = sum(sizes.values())
    first = rng.choice((0, 1, total // 3, total - 1, max(sizes.values())))
    second = rng.choice((0, total // 4, max(sizes.values()) - 1))
    options = {"min_bytes": 0, "prefetch": rng.choice(("auto", "4mb", 0))}
    for spec in (
        f"sim:0,{first}b;cpu,*",
        f"sim:0,{first}b;sim:1,{second}b;cpu,*",
        f"sim:0,{first}b;cpu,{second}b;sim:2,0b;sim:1,*",
        f"cpu,*;sim:2,{second}b;sim:0,{first}b",
        f"sim:0,{first}b;cpu+sim:1,{second}b;sim:2,*",
        f"sim:0,*;sim:1,{second}b",
        "sim:0,1%;sim:1,2%;cpu,1%",
    ):
        found, usual = both(module, step, spec, **options)
        assert found.seconds <= usual.seconds * (1 + 1e-9), spec
        assert found.bound_seconds <= found.seconds * 1.001, spec
        for entry in spec.split(";"):
            device, share = entry.split(",")
            if share.endswith("b"):
                assert found.plan.bytes.get(device, 0) <= int(share[:-1]), (spec, device)
        if "sim:0,*" in spec:  # it takes the rest, and no more than usual
            assert found.plan.bytes["sim:0"] <= usual.plan.bytes["sim:0"]
        assert found.plan.total_bytes == total
        again = distorch.plan(module, spec, order="optimal", step=step, **options)
        assert again.hash == found.plan.hash


def test_a_block_that_runs_again_and_again_stays():
    module = Albert(rounds=6)
    step = step_of(module, there(64, 1024))
    block = sum(n for name, n in sizes_of(module).items() if name.startswith("block"))
    spec = f"sim:0,{block}b;cpu,*"
    found, usual = both(module, step, spec, min_bytes=0, prefetch="30mb")
    where = {n: "sim:0" if n.startswith("block") else "cpu" for n in sizes_of(module)}
    mine = placed(module, step, where, min_bytes=0, prefetch="30mb").seconds
    assert found.seconds <= min(1.01 * mine, usual.seconds)


def test_what_is_not_used_leaves_first_and_to_the_slowest():
    two_donors()

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = chain(12, 1024), chain(12, 1024)

        def forward(self, x):
            return self.used(x)

    module = Half()
    step = step_of(module, there(8, 1024))
    spec = "sim:0,24mb;cpu,12mb;sim:1,*"
    options = {"order": "optimal", "step": step, "min_bytes": 0, "prefetch": "2mb"}
    plan = distorch.plan(module, spec, **options)
    assert {plan.placement[f"used.{i}.weight"] for i in range(12)} == {"sim:0"}
    assert plan.placement["unused.0.weight"] == "sim:1"
    kept = distorch.plan(module, spec, keep=["unused.0.*"], **options)
    assert kept.placement["unused.0.weight"] == "sim:0"


def test_the_options_hold():
    two_donors()
    module = chain(10, 1024)
    module[9].weight = module[0].weight  # tied
    step = step_of(module, there(64, 1024))
    plan = distorch.plan(
        module, "sim:0,40%;cpu,30%;sim:1,*", order="optimal", step=step, min_bytes=0,
        keep=["3.*"], offload=["4.*"], rules=[("5.*", "sim:1"), ("6.*", "sim:0")],
    )  # fmt: skip
    assert plan.placement["3.weight"] == plan.placement["6.weight"] == "sim:0"
    assert plan.placement["4.weight"] != "sim:0"
    assert plan.placement["5.weight"] == "sim:1"
    assert plan.placement["9.weight"] == plan.placement["0.weight"]
    assert plan.total_bytes == 9 * 2 * MB
    given = distorch.plan(
        module, virtual_vram="8mb", donor="sim:1,cpu", order="optimal", step=step, min_bytes=0
    )
    assert given.bytes["sim:0"] == 10 * MB
    small = distorch.plan(chain(2, 64), ALL_AWAY, order="optimal", step=step)
    assert small.bytes == {"sim:0": 2 * 64 * 64 * 2}


class Language(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(32768, 1024, dtype=DTYPE, device="meta")
        self.body = chain(16, 1024)
        self.head = linear(1024, 32768) if tied else nn.Identity()
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def tokens(count=128):
    return torch.zeros(count, dtype=torch.long, device="sim:0")


@pytest.mark.parametrize("share", [20, 64])
def test_rows_of_a_table_hardly_travel(share):
    module = Language()
    step = step_of(module, tokens())
    spec = f"sim:0,{share * MB}b;cpu,*"
    found, usual = both(module, step, spec, min_bytes=0, prefetch="5mb")
    assert found.plan.placement["embed.weight"] == "cpu"
    assert found.seconds <= usual.seconds * (1 + 1e-9)
    assert found.bound_seconds <= found.seconds * 1.001


def test_a_table_that_is_used_whole_as_well_is_no_light_one(tmp_path):
    from safetensors.torch import save_file

    module = Language(tied=True)
    step = step_of(module, tokens())
    file = tmp_path / "tied.safetensors"
    save_file(
        {name: torch.zeros(p.shape, dtype=DTYPE) for name, p in module.named_parameters()}, file
    )
    spec, options = f"sim:0,{66 * MB}b;cpu,*", {"min_bytes": 0, "prefetch": "5mb"}
    usual = distorch.predict(module, step, spec, **options).seconds
    for source in (module, file):
        plan = distorch.plan(source, spec, order="optimal", step=step, **options)
        where = {name: plan.placement[name] for name in sizes_of(module)}
        assert placed(module, step, where, **options).seconds <= usual * (1 + 1e-9), source


def test_tables_alone():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.all = nn.ModuleList(
                nn.Embedding(16384, 128, dtype=DTYPE, device="meta") for _ in range(26)
            )

        def forward(self, x):
            return sum(table(x) for table in self.all)

    module = Tables()
    step = step_of(module, tokens(8))
    plan = distorch.plan(module, "sim:0,40mb;cpu,*", order="optimal", step=step, prefetch=0)
    assert plan.bytes["sim:0"] <= 40 * MB and plan.total_bytes == 104 * MB


def test_the_ring_depends_on_what_travels():
    # A ring of "auto" holds two of the largest weights that travel.
    module = Layers([(8, 4096, 20480)] + [(8, 1024, 5120)] * 24)
    step, sizes = step_of(module), sizes_of(module)
    largest = max(sizes.values())
    where = {n: "cpu" if size == largest else "sim:0" for n, size in sizes.items()}
    other = placed(module, step, where, min_bytes=0)
    share = other.plan.bytes["sim:0"]
    found = distorch.predict(module, step, f"sim:0,{share}b;cpu,*", min_bytes=0)
    assert found.bound_seconds <= other.seconds * 1.001


def test_free_memory_counts_not_only_the_share():
    weights = tuple(WeightInfo(f"w{i}", 2 * MB, (1024, 1024), "bfloat16") for i in range(16))
    devices = {
        "cpu": DeviceInfo("cpu", 1 << 34, 1 << 34),
        "sim:0": DeviceInfo("sim:0", 30 * MB, 19 * MB),
    }
    noted = []

    def arrange(freedom, plan_for):
        noted.append(freedom)
        return freedom.placement

    spec = "cpu,16mb;sim:0,28mb"
    make_plan(
        Inventory(weights), spec, compute="sim:0", devices=devices, min_bytes=0, arrange=arrange
    )
    assert noted[0].rooms == {"sim:0": 19 * MB, "cpu": 16 * MB}
    assert len(noted[0].free) == 16


def test_the_cpu_computes(monkeypatch):
    known = Calibration(
        (Link("disk", "cpu", 1e9, 1e-4, 1e9, None),), (Speed("cpu", 1e10, 1e11, 1e11, 0.0, 0.0),)
    )
    monkeypatch.setattr("distorch.rehearsal.optimal.measured_links", lambda: known)
    module = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).requires_grad_(False)
    x = torch.randn(4, 512)
    expected = module(x)
    options = {"compute": "cpu", "min_bytes": 0, "prefetch": "2mb"}
    distorch.distribute(module, "cpu,*", **options)
    step = record(module, lambda: module(x))
    distorch.redistribute(module, "cpu,40%;disk,*", order="optimal", step=step)
    plan = distorch.plan(module, "cpu,40%;disk,*")
    assert plan.order == "optimal"
    assert 0.3 * plan.total_bytes < plan.bytes["cpu"] <= 0.4 * plan.total_bytes
    assert distorch.report(module).placement == plan.placement
    assert torch.equal(module(x), expected)


def test_it_lasts_until_something_else_is_said(tmp_path):
    module, run, step = ready(8)
    spec, other = "sim:0,30%;cpu,*", "sim:0,50%;cpu,*"
    options = {"min_bytes": 0, "prefetch": "4mb"}
    distorch.redistribute(module, spec, order="optimal", step=step, **options)
    run()
    plan = distorch.plan(module, spec)
    assert plan.order == "optimal"
    plan.save(tmp_path / "plan.json")
    step.save(tmp_path / "step.json")
    loaded = distorch.Plan.load(tmp_path / "plan.json")
    assert loaded.hash == plan.hash
    again = distorch.Step.load(tmp_path / "step.json")
    assert distorch.plan(module, spec, step=again).hash == plan.hash
    distorch.redistribute(module, other)  # the order and the step are kept
    wanted = distorch.plan(chain(8, 1024), other, order="optimal", step=step, **options)
    assert distorch.report(module).placement == wanted.placement
    distorch.redistribute(module, other, order="interleaved")
    assert distorch.plan(module, other).order == "interleaved"
    # A saved plan says it all; what comes after it needs a step.
    fresh = chain(8, 1024)
    distorch.distribute(fresh, plan=loaded)
    assert distorch.report(fresh).placement == plan.placement
    with pytest.raises(SpecError, match="needs step="):
        distorch.redistribute(fresh, other)
    distorch.redistribute(fresh, other, step=step)
    assert distorch.report(fresh).placement == wanted.placement


def test_what_is_wrong_is_said(monkeypatch):
    configure(devices=2)
    module, _, step = ready()
    with pytest.raises(SpecError, match=r"needs step=.*record_step"):
        distorch.plan(module, ALL_AWAY, order="optimal")
    with pytest.raises(SpecError, match=r"step=: expected a step.*got dict"):
        distorch.redistribute(module, ALL_AWAY, order="optimal", step={})
    with pytest.raises(SpecError, match="'interleaved', 'sequential' or 'optimal'"):
        distorch.plan(module, ALL_AWAY, order="best")
    with pytest.raises(PlacementError, match=r"the step uses '0\.weight'"):
        distorch.plan(chain(3, 512), ALL_AWAY, order="optimal", step=step, min_bytes=0)
    with pytest.raises(PlacementError, match="recorded on 'sim:0'"):
        distorch.plan(module, "sim:1,0b;cpu,*", compute="sim:1", order="optimal", step=step)
    assert set(distorch.report(module).placement.values()) == {"sim:0"}, "something moved"
    monkeypatch.setattr("distorch.rehearsal.optimal.measured_links", _nothing_measured)
    with pytest.raises(PlacementError, match="were not measured"):
        distorch.plan(module, ALL_AWAY, order="optimal", step=step)


def _nothing_measured():
    raise PlacementError("the links of this machine were not measured")


def test_a_checkpoint_is_placed_while_it_is_loaded(tmp_path):
    from safetensors.torch import save_file

    layers, spec, ring = UNEVEN[0]
    module = Layers(layers)
    step = step_of(module)
    file = tmp_path / "model.safetensors"
    save_file(
        {name: torch.zeros(p.shape, dtype=DTYPE) for name, p in module.named_parameters()}, file
    )
    target = Layers(layers)
    options = {"min_bytes": 0, "prefetch": ring}
    distorch.load(target, file, spec, progress=False, order="optimal", step=step, **options)
    found = distorch.predict(target, step, **options)
    assert found.plan.order == "optimal"
    assert found.seconds <= 0.9 * distorch.predict(module, step, spec, **options).seconds
    agrees(found, measure(inference(target, there(1))))
    planned = distorch.plan(
        file, spec, module=Layers(layers), order="optimal", step=step, **options
    )
    assert planned.placement == found.plan.placement
    with pytest.raises(PlacementError, match=r"step=: expected one of this model"):
        distorch.plan(file, spec, order="optimal", step=ready(7)[2], **options)


_HASH = """
import sys
import torch
import distorch
from tests.prediction.programs import configure, chain, inference, record, resident, there
configure()
distorch.calibrate(progress=False)
module = resident(chain(30, 512))
run = inference(module, there(64, 512))
run()
step = record(module, run)
print(distorch.plan(module, "sim:0,40%;cpu,*", order="optimal", step=step, min_bytes=0,
                    prefetch="2mb").hash)
"""


def test_every_process_finds_the_same(tmp_path):
    found = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "XDG_CACHE_HOME": str(tmp_path / seed)}
        done = subprocess.run(
            [sys.executable, "-c", _HASH], capture_output=True, text=True, env=env, check=True
        )
        found.add(done.stdout.strip())
    assert len(found) == 1
