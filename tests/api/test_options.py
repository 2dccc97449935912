# SPDX-License-Identifier: Apache-2.0
"""Options of the functions that users call: kept, counted, spelled, typed."""

import inspect
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch.runtime import distribution

LINEAR = 64 * 64 * 4


def stack(count=8, width=64):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def on_disk(module):
    return [name for name, place in distorch.report(module).placement.items() if place == "disk"]


KEPT = {
    "min_bytes": 0, "keep": ("0.*",), "offload": ("1.*",), "rules": (("2.*", "cpu"),),
    "order": "sequential", "prefetch": 4096, "compress": "never",
}  # fmt: skip


@pytest.mark.parametrize("call", [distorch.distribute, distorch.redistribute])
def test_what_is_not_given_stays_as_it_was(call):
    model = distorch.distribute(stack(), "cpu,50%;disk,50%", **KEPT)
    planned = distorch.plan(model, "cpu,64kb;disk,*")
    call(model, "cpu,64kb;disk,*")
    assert distorch.report(model).placement == planned.placement
    # 0 is kept, 1 leaves, 2 has a rule; the first ones of the others fill the share.
    assert on_disk(model) == [f"{i}.weight" for i in (1, 5, 6, 7)]
    options = vars(distribution.distribution_of(model).options)
    assert {name: options[name] for name in KEPT} == KEPT
    call(model, "disk,*", keep=())
    assert on_disk(model) == [f"{i}.weight" for i in (0, 1, 3, 4, 5, 6, 7)]
    assert distribution.distribution_of(model).options.order == "sequential"


def test_the_callers_list_is_the_callers():
    keep = ["0.*"]
    model = distorch.distribute(stack(), "disk,*", min_bytes=0, keep=keep)
    keep.append("1.*")
    assert len(on_disk(distorch.redistribute(model, "disk,*"))) == 7


def test_a_plan_brings_its_options():
    plan = distorch.plan(stack(), "cpu,0b;disk,*", min_bytes=0, keep=["0.*"])
    model = distorch.distribute(stack(), plan=plan, min_bytes=0)
    distorch.redistribute(model, "disk,*")
    assert on_disk(model) == [f"{i}.weight" for i in range(1, 8)]
    with pytest.raises(distorch.SpecError, match="min_bytes=1: the plan .* made with 0"):
        distorch.distribute(stack(), plan=plan, min_bytes=1)
    auto = distorch.distribute(stack(), plan=plan, min_bytes="auto")
    assert distribution.distribution_of(auto).options.min_bytes == "auto"


SMALL = 40 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("options", "to_do"),
    [
        ({"spec": "cpu,64kb;disk,*"}, "Give min_bytes='auto'"),
        ({"spec": "cpu,10%;disk,90%"}, "Give min_bytes='auto'"),
        ({"spec": "cpu,64kb;disk,*", "min_bytes": "16385b"}, "min_bytes \\(16385\\)"),
        ({"spec": "cpu,64kb;disk,*", "min_bytes": 0, "keep": "*"}, "Give fewer names to keep"),
        ({"virtual_vram": "512kb", "donor": "disk"}, "Give min_bytes='auto'"),
        ({"virtual_vram": "1gb", "donor": "disk"}, "its share of 0 .*Give min_bytes='auto'"),
    ],
)
def test_a_share_that_is_too_small_is_said(options, to_do, tmp_path):
    torch.save(stack(40).state_dict(), tmp_path / "m.pt")
    model = distorch.distribute(stack(40), "disk,*", min_bytes=1 << 20)
    calls = [
        lambda: distorch.distribute(stack(40), **options),
        lambda: distorch.redistribute(model, **options),
        lambda: distorch.load(stack(40), tmp_path / "m.pt", **options),
        lambda: distorch.plan(stack(40), **options),
        lambda: distorch.plan(tmp_path / "m.pt", module=stack(40), **options),
    ]
    for call in calls:
        with pytest.warns(distorch.PlacementWarning, match=to_do) as caught:
            found = call()
        assert [warning.filename for warning in caught] == [__file__]
        if isinstance(found, distorch.Plan):
            assert found.bytes["cpu"] == SMALL
            continue
        report = distorch.report(found)
        assert report.bytes["cpu"] == SMALL
        assert not report.ok and "more than its share" in report.problems[0]
    with pytest.warns(distorch.PlacementWarning, match=to_do):
        distorch.distribute(stack(40), plan=found)


def test_what_came_later_is_planned_anew():
    model = distorch.distribute(stack(), "cpu,64kb;disk,*", min_bytes=0)
    model.append(nn.Linear(64, 64))
    assert "distorch.redistribute plans anew" in distorch.report(model).problems[0]


def test_a_buffer_that_is_too_large_is_named():
    model = stack()
    model.register_buffer("table", torch.zeros(1 << 16))
    with pytest.warns(distorch.PlacementWarning, match="\\(buffers\\).*'table'.*Give a larger"):
        distorch.distribute(model, "cpu,64kb;disk,*", min_bytes=0)


@pytest.mark.parametrize(
    ("spec", "share", "floor"),
    [("cpu,64kb;disk,*", 65536, 0), ("cpu,10%;disk,90%", SMALL // 10, 0)],
)
def test_min_bytes_auto_keeps_the_share(spec, share, floor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = distorch.distribute(stack(40), spec, min_bytes="auto")
    report = distorch.report(model)
    assert report.ok and share - LINEAR < report.bytes["cpu"] <= share
    assert distorch.plan(stack(40), spec, min_bytes="auto").floor == floor


def test_min_bytes_auto_lets_the_largest_leave_first():
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 16), nn.Linear(16, 8), nn.Linear(8, 8))
    distorch.distribute(model, "cpu,16kb;disk,*", min_bytes="auto")
    assert on_disk(model) == ["0.weight", "1.weight"]
    distorch.distribute(model, "cpu,300b;disk,*")  # only vectors are left, and they must go, too
    assert distorch.report(model).bytes["cpu"] <= 300
    large = distorch.plan(stack(2, width=600), "cpu,1.5mb;disk,*", min_bytes="auto")
    assert large.options["min_bytes"] == 1 << 20  # as usual where it does


def test_a_share_of_nothing_asks_for_no_more_than_the_usual():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = distorch.distribute(stack(), "cpu,0b;disk,*")
        assert distorch.report(model).ok and not on_disk(model)
        assert distorch.plan(stack(), "cpu,0b;disk,*").floor == 8 * LINEAR


def test_min_bytes_auto_gives_away_what_was_asked_for():
    for given, stays in (("512kb", SMALL - 512 * 1024), ("1gb", 0)):
        model = distorch.distribute(stack(40), virtual_vram=given, donor="disk", min_bytes="auto")
        assert distorch.report(model).ok and distorch.report(model).bytes["cpu"] == stays


def test_less_than_one_tensor_is_no_shortfall():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = distorch.distribute(stack(), virtual_vram="40kb", donor="disk", min_bytes=0)
    assert distorch.report(model).ok and len(on_disk(model)) == 2


def test_min_bytes_auto_leaves_room_for_rules():
    model = nn.Sequential(*(nn.Linear(64, n, bias=False) for n in (128, 128, 64, 64)))
    rules = [("0.*", "cpu")]
    distorch.distribute(model, "cpu,64kb;disk,*", rules=rules, min_bytes="auto")
    assert distorch.report(model).ok and distorch.report(model).placement["0.weight"] == "cpu"


@pytest.mark.parametrize("size", [16384, "16kb", "16 KiB", "16384", np.int64(16384)])
@pytest.mark.parametrize("option", ["min_bytes", "prefetch"])
def test_bytes_are_spelled_as_people_do(option, size):
    options = {"min_bytes": 0, option: size}
    assert len(on_disk(distorch.distribute(stack(), "disk,*", **options))) == 8


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16", "BFloat16"]
)
def test_dtypes_are_spelled_as_people_do(dtype, tmp_path):
    torch.save(stack().state_dict(), tmp_path / "m.pt")
    model = distorch.load(stack(), tmp_path / "m.pt", "cpu,*", dtype=dtype, patched_dtype=dtype)
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("resident", "nbytes"),
    [("dequantised", 4), ("dequantized", 4), ("quantised", 1), ("quantized", 1)],
)
def test_either_spelling(resident, nbytes, tmp_path):
    weight = torch.ones(64, 64).to(torch.float8_e4m3fn)
    tensors = {"0.weight": weight, "0.weight_scale": torch.ones(())}
    save_file(tensors, tmp_path / "m.safetensors")
    model = distorch.load(stack(1), tmp_path / "m.safetensors", "cpu,*", resident=resident)
    assert distorch.report(model).bytes["cpu"] == 64 * 64 * nbytes


def calls(tmp_path):
    """(function of progress=, the bytes that it should be told)."""
    torch.save(stack().state_dict(), tmp_path / "m.pt")
    model = distorch.distribute(stack(), "cpu,*", min_bytes=0)
    lora = {"0.lora_A.weight": torch.ones(1, 64), "0.lora_B.weight": torch.ones(64, 1)}
    return [
        (lambda p: distorch.load(stack(), tmp_path / "m.pt", "cpu,*", progress=p), 8 * LINEAR),
        (lambda p: distorch.distribute(stack(), "disk,*", min_bytes=0, progress=p), 8 * LINEAR),
        (lambda p: distorch.redistribute(model, "disk,*", progress=p), 8 * LINEAR),
        (lambda p: distorch.set_loras(model, [(lora, 1.0)], progress=p), LINEAR),
    ]


def test_progress_is_one_thing_everywhere(tmp_path, capsys):
    for call, total in calls(tmp_path):
        told = []
        call(told.append)
        assert sum(told) == total
    assert not capsys.readouterr().err
    for call, _ in calls(tmp_path):
        call(None)
        call(False)
    assert not capsys.readouterr().err  # no terminal
    for call, _ in calls(tmp_path):
        call(True)
        assert "100%" in capsys.readouterr().err
    for call, _ in calls(tmp_path):
        with pytest.raises(distorch.SpecError, match="progress='yes'"):
            call("yes")


def test_editors_can_complete_options():
    for function in (distorch.distribute, distorch.redistribute, distorch.load, distorch.plan):
        hints = typing.get_type_hints(function)
        names = typing.get_type_hints(typing.get_args(hints["options"])[0])
        assert typing.get_args(names["order"]) == ("interleaved", "sequential", "optimal")
        options = vars(distorch.runtime.options.Options())
        assert options.keys() <= names.keys()
        for name in options.keys() & inspect.signature(function).parameters.keys():
            pytest.fail(f"{name} is twice in {function.__name__}")
    assert "fetch" in typing.get_args(typing.get_type_hints(distorch.load)["lora_mode"])


def test_no_function_hides_a_module():
    root = inspect.getfile(distorch).removesuffix("__init__.py")
    modules = {path.stem for path in Path(root).iterdir()}
    assert not modules & {name for name in distorch.__all__ if callable(getattr(distorch, name))}


def test_what_is_printed_is_the_table():
    model = distorch.distribute(stack(), "cpu,50%;disk,50%", min_bytes=0)
    plan = distorch.plan(model, "disk,*")
    for shown in (plan, distorch.report(model), distorch.stats(model), plan.diff(plan)):
        assert repr(shown) == str(shown)
    assert {plan: 1}[distorch.plan(model, "disk,*")] == 1
    assert distorch.stats(model).to_dict()["fetches"] == 0
