"""Options of the functions that users call: kept, counted, spelled, typed."""

import inspect
import typing
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import distorch

LINEAR = 64 * 64 * 4


def stack(count=8, width=64):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def on_disk(module):
    return [name for name, place in distorch.report(module).placement.items() if place == "disk"]


@pytest.mark.parametrize(
    ("option", "value", "elsewhere"),
    [
        ("min_bytes", 0, 8),
        ("keep", ["0.*"], 7),
        ("offload", ["0.*"], 8),
        ("rules", [("0.*", "cpu")], 7),
    ],
)
@pytest.mark.parametrize("call", [distorch.distribute, distorch.redistribute, distorch.plan])
def test_what_is_not_given_stays_as_it_was(call, option, value, elsewhere):
    options = {"min_bytes": 0, option: value}
    spec = "cpu,16kb;disk,*" if option == "rules" else "cpu,0b;disk,*"
    model = distorch.distribute(stack(), "cpu,50%;disk,50%", **options, order="sequential")
    found = call(model, spec)
    placement = found.placement if call is distorch.plan else distorch.report(model).placement
    assert list(placement.values()).count("disk") == elsewhere
    assert call(model, spec, order="interleaved") is not None  # that was only added


def test_a_plan_brings_its_options():
    plan = distorch.plan(stack(), "cpu,0b;disk,*", min_bytes=0, keep=["0.*"])
    model = distorch.distribute(stack(), plan=plan, min_bytes=0)
    distorch.redistribute(model, "disk,*")
    assert on_disk(model) == [f"{i}.weight" for i in range(1, 8)]
    with pytest.raises(distorch.SpecError, match="min_bytes=1: the plan .* made with 0"):
        distorch.distribute(stack(), plan=plan, min_bytes=1)


SMALL = 40 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"spec": "cpu,64kb;disk,*"}, SMALL),
        ({"spec": "cpu,10%;disk,90%"}, SMALL),
        ({"spec": "cpu,64kb;disk,*", "min_bytes": "16385b"}, SMALL),
        ({"spec": "cpu,64kb;disk,*", "min_bytes": 0, "keep": "*"}, SMALL),
        ({"virtual_vram": "512kb", "donor": "disk"}, SMALL),
    ],
)
def test_a_share_that_is_too_small_is_said(options, held):
    with pytest.warns(distorch.PlacementWarning, match="min_bytes") as caught:
        model = distorch.distribute(stack(40), **options)
    assert caught[0].filename == __file__
    report = distorch.report(model)
    assert report.bytes["cpu"] == held
    assert not report.ok and "min_bytes" in report.problems[0]


def test_a_buffer_that_is_too_large_is_named():
    model = stack()
    model.register_buffer("table", torch.zeros(1 << 16))
    with pytest.warns(distorch.PlacementWarning, match="'table'"):
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
        distorch.distribute(stack(), virtual_vram="1gb", donor="disk")


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


@pytest.mark.parametrize("resident", ["dequantised", "dequantized"])
def test_either_spelling(resident, tmp_path):
    torch.save(stack().state_dict(), tmp_path / "m.pt")
    distorch.load(stack(), tmp_path / "m.pt", "cpu,*", resident=resident)


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
        assert typing.get_args(names["order"]) == ("interleaved", "sequential")
        options = vars(distorch.runtime.options.Options())
        assert options.keys() <= names.keys()
        for name in options.keys() & inspect.signature(function).parameters.keys():
            pytest.fail(f"{name} is twice in {function.__name__}")
    assert "fetch" in typing.get_args(typing.get_type_hints(distorch.load)["lora_mode"])


def test_no_function_hides_a_module():
    root = inspect.getfile(distorch).removesuffix("__init__.py")
    modules = {path.removesuffix(".py") for path in __import__("os").listdir(root)}
    assert not modules & {name for name in distorch.__all__ if callable(getattr(distorch, name))}


def test_what_is_printed_is_the_table():
    model = distorch.distribute(stack(), "cpu,50%;disk,50%", min_bytes=0)
    plan = distorch.plan(model, "disk,*")
    for shown in (plan, distorch.report(model), distorch.stats(model), plan.diff(plan)):
        assert repr(shown) == str(shown)
    assert {plan: 1}[distorch.plan(model, "disk,*")] == 1
    assert distorch.stats(model).to_dict()["fetches"] == 0
