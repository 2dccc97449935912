# SPDX-License-Identifier: Apache-2.0
"""What a prediction is, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distorch
from tests.prediction.programs import (
    ALL_AWAY,
    CPU,
    Albert,
    chain,
    inference,
    measure,
    ready,
    record,
    resident,
    there,
)


def test_predicting_and_recording_change_nothing():
    """What-if questions in a loop over specs, between the steps of a long job."""
    module, run, step = ready()
    distorch.redistribute(module, "sim:0,30%;cpu,*", prefetch="5mb", min_bytes=0)
    before, held = measure(run), torch.sim.memory_allocated("sim:0")
    placement = dict(distorch.report(module).placement)
    predictions = {}
    for percent in (0, 20, 50, 80, 100):
        spec = f"sim:0,{percent}%;cpu,*" if percent else ALL_AWAY
        predictions[percent] = distorch.predict(module, step, spec, prefetch="5mb", min_bytes=0)
    record(module, run)
    assert torch.sim.memory_allocated("sim:0") == held
    assert dict(distorch.report(module).placement) == placement
    assert distorch.report(module).ok
    assert measure(run).seconds == pytest.approx(before.seconds, rel=0.02)
    seconds = [predictions[percent].seconds for percent in (0, 20, 50, 80, 100)]
    assert seconds == sorted(seconds, reverse=True)
    again = distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0)
    assert again.to_dict() == predictions[0].to_dict()


def test_what_it_shows(tmp_path):
    module, _, step = ready()
    prediction = distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0)
    total = sum(p.nbytes for p in module.parameters())
    assert prediction.links[CPU].bytes == total
    assert isinstance(prediction.timeline, distorch.Timeline)
    copies = prediction.timeline.tracks[f"copies {CPU}"]
    assert sum(span.bytes for span in copies) == total
    assert json.loads(json.dumps(prediction.to_dict()))["seconds"] == prediction.seconds
    assert CPU in str(prediction)
    prediction.plot(tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()
    prediction.timeline.save(tmp_path / "p.json")
    assert len(distorch.Timeline.load(tmp_path / "p.json").spans) == len(prediction.timeline.spans)


def test_a_step_in_another_process(tmp_path):
    """Recorded on one day, asked on another one: the file fits the same model made anew."""
    module, _, step = ready()
    wanted = distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0).to_dict()
    step.save(tmp_path / "step.json")
    del module, step
    other = resident(chain(6, 1024))
    loaded = distorch.Step.load(tmp_path / "step.json")
    assert (
        distorch.predict(other, loaded, ALL_AWAY, prefetch="5mb", min_bytes=0).to_dict() == wanted
    )


@pytest.mark.parametrize(
    "other",
    [lambda: chain(7, 1024), lambda: chain(6, 512), Albert],
    ids=["longer", "narrower", "else"],
)
def test_a_step_of_another_module(other):
    """More layers, other sizes, or another model: the step says nothing about it. (All weights of
    the step are in the longer one. If it is taken there, it must be as a step that leaves one out.)
    """
    _, _, step = ready()
    module = resident(other())
    if isinstance(module, nn.Sequential) and len(module) == 7:
        try:
            said = distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0)
        except distorch.DistorchError:
            return
        assert said.links[CPU].bytes == 6 * module[0].weight.nbytes
        return
    with pytest.raises(distorch.DistorchError, match="step"):
        distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0)


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "cut at the end": lambda text: text[:-2],
    "a list": lambda text: "[]",
    "a number": lambda text: "7",
    "deep": lambda text: "[" * 100_000,
    "of another program": lambda text: json.dumps({"traceEvents": []}),
    "without its largest part": lambda text: json.dumps(
        {k: v for k, v in json.loads(text).items() if k != max(json.loads(text), key=lambda k: len(str(json.loads(text)[k])))}
    ),
    "binary": lambda text: "\x00\x81" * 100,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_file(tmp_path, damage):
    _, _, step = ready()
    file = tmp_path / "step.json"
    step.save(file)
    file.write_text(DAMAGES[damage](file.read_text()))
    with pytest.raises(distorch.FormatError, match="step"):
        distorch.Step.load(file)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1", '"x"', "null", "1e400", "[]"])
def test_a_step_file_with_impossible_numbers(tmp_path, number):
    """Each number of the file in turn is replaced: it is an error of the file, or harmless, and
    never another exception or a prediction that is no number.
    """
    module, _, step = ready(3)
    file = tmp_path / "step.json"
    step.save(file)
    content = json.loads(file.read_text())
    places: list[tuple[Any, Any]] = []

    def find(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list):
                find(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                places.append((node, key))

    find(content)
    assert places
    for node, key in places[:60]:
        old, node[key] = node[key], "HERE"
        file.write_text(json.dumps(content).replace('"HERE"', number))
        node[key] = old
        try:
            loaded = distorch.Step.load(file)
            said = distorch.predict(module, loaded, ALL_AWAY, prefetch="5mb", min_bytes=0)
        except distorch.DistorchError:
            continue
        assert 0 <= said.seconds < float("inf")


def test_a_step_file_that_is_not_there(tmp_path):
    with pytest.raises(distorch.FormatError, match="step"):
        distorch.Step.load(tmp_path / "nothing.json")
    with pytest.raises(distorch.FormatError, match="step"):
        distorch.Step.load(tmp_path)


def test_nothing_was_calibrated():
    """The error says what to do. (Recording needs no calibration.)"""
    module = resident(chain(4, 1024))
    run = inference(module, there(1024, 1024))
    step = record(module, run)
    with pytest.raises(distorch.DistorchError, match="calibrate"):
        distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0)
    distorch.calibrate(progress=False)
    assert distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0).seconds > 0


def test_never_distributed():
    _, _, step = ready()
    plain = chain(6, 1024)
    with pytest.raises(distorch.PlacementError, match="distribut"), distorch.record_step(plain):
        pass
    with pytest.raises(distorch.PlacementError, match="distribut"):
        distorch.predict(plain, step)


def test_nothing_ran():
    """A typo calls another model in the block: an error, here or there, and no prediction of 0 s."""
    module, _, _ = ready()
    with pytest.raises(distorch.DistorchError):
        step = record(module, lambda: None)
        distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0)


def test_an_error_in_the_block():
    """Out of memory in the middle of a step: the user's error comes out, and the next recording is
    whole. Half a step is no step.
    """
    module, run, step = ready()
    wanted = distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0).seconds

    class OwnError(Exception):
        pass

    def breaks(*_: Any) -> None:
        raise OwnError

    hook = module[3].register_forward_hook(breaks)
    kept: list[Any] = []
    with pytest.raises(OwnError), distorch.record_step(module) as half:
        kept.append(half)
        run()
    hook.remove()
    with pytest.raises(distorch.DistorchError):
        distorch.predict(module, kept[0], ALL_AWAY, prefetch="5mb", min_bytes=0)
    with distorch.trace(module):  # nothing was left on
        run()
    after = distorch.predict(module, record(module, run), ALL_AWAY, prefetch="5mb", min_bytes=0)
    assert after.seconds == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("change", ["redistribute", "undistribute"])
def test_weights_that_move_in_the_block(change):
    """ComfyUI frees a model between two nodes: either the change, the block or the prediction says
    no, or the prediction is right. And the module works afterwards.
    """
    module, run, step = ready()
    wanted = distorch.predict(module, step, ALL_AWAY, prefetch="5mb", min_bytes=0).seconds

    def moves() -> None:
        run()
        if change == "redistribute":
            distorch.redistribute(module, "sim:0,50%;cpu,*", prefetch="5mb", min_bytes=0)
        else:
            distorch.undistribute(module)

    try:
        moved = record(module, moves)
        if change == "undistribute":
            resident(module)
        said = distorch.predict(module, moved, ALL_AWAY, prefetch="5mb", min_bytes=0)
    except distorch.DistorchError:
        pass
    else:
        assert said.seconds == pytest.approx(wanted, rel=0.02)
    distorch.distribute(module, ALL_AWAY, prefetch="5mb", min_bytes=0)
    assert measure(run).seconds == pytest.approx(wanted, rel=0.02)


def test_one_recording_inside_of_another():
    """Refused, or both are right; the outer one lives on."""
    module, run, step = ready()
    wanted = distorch.predict(module, step).seconds
    with distorch.record_step(module) as outer:
        try:
            with distorch.record_step(module):
                pass
        except distorch.DistorchError:
            pass
        run()
    assert distorch.predict(module, outer).seconds == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("sim:0,30%;cpu", {}), ("sim:0,1gb;sim:7,*", {}), ("nonsense", {}), ("", {}),
        (ALL_AWAY, {"prefetch": "much"}), (ALL_AWAY, {"prefetch": -1}), (ALL_AWAY, {"no_such": 1}),
        ("sim:0,4tb;cpu,*", {}), ("sim:0,0b;cpu,1kb", {"min_bytes": 0}),
    ],
)  # fmt: skip
def test_what_distribute_refuses(spec, options):
    """A prediction of a placement that cannot be is the error of `distribute`, word for word."""
    module, _, step = ready()
    with pytest.raises((distorch.DistorchError, TypeError)) as wanted:
        distorch.distribute(module, spec, **options)
    with pytest.raises(type(wanted.value)) as found:
        distorch.predict(module, step, spec, **options)
    assert str(wanted.value)[:40] == str(found.value)[:40] or type(wanted.value) is TypeError
    assert distorch.report(module).ok
