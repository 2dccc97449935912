# SPDX-License-Identifier: Apache-2.0
"""What items make of how their processes end, without any process."""

import json
from types import SimpleNamespace

import pytest

from tests.gpu.report import benchmarks, facts, items
from tests.gpu.report.runner import Ended
from tests.gpu.report.schedule import Schedule


def ended(status=0, timed_out=False, log=""):
    return Ended(status, timed_out, 1.0, log, "", [])


@pytest.fixture
def report(tmp_path):
    """A report whose processes end as `ends` says, in turn."""
    results, limits, told = [], [], {}

    def run(title, command, limit, env=None, watched=None):
        limits.append((title, limit))
        end = found.ends.pop(0)
        return end(command) if callable(end) else end

    found = SimpleNamespace(
        device="cuda", scratch=tmp_path, schedule=Schedule(300), benchmark={}, usable=True, ends=[],
        workplace=SimpleNamespace(built=lambda: True), options=SimpleNamespace(), results=results,
        pack=SimpleNamespace(benchmark=lambda _: None), limits=limits, told=told, gpus=list,
        side_by_side=lambda _: 1, run=run, add=results.append, tell_facts=told.update, use_copy=lambda: None,
    )  # fmt: skip
    return found


def outcomes(report):
    return [(result.part, result.status) for result in report.results]


def test_a_slow_first_import_is_tried_again(report):
    report.ends = [ended(-9, True), ended(log='{"torch": "2"}'), ended()]
    items.imported(report, 30)
    assert outcomes(report) == [("import distorch", "passed"), ("doctor", "passed")]
    assert [limit for _, limit in report.limits] == [30, 90, 30]
    assert report.told == {"torch": "2"}


@pytest.mark.parametrize(
    ("ends", "built"),
    [
        ([ended(-9, True), ended(-9, True)], False),
        ([ended(facts.NO_CUDA, log='{"torch": "2"}\ntorch sees no device')], False),
        ([ended(1, log="ImportError"), ended(), ended(), ended()], True),
    ],
)
def test_what_building_may_help(report, ends, built):
    report.ends = ends
    items.imported(report, 30)
    assert ("import: build" in dict(report.limits)) == built
    assert report.usable == built
    assert report.results[0].status in ("failed", "timed out")


def test_cards_that_let_one_process_in():
    assert facts.exclusive([{"compute_mode": "Default"}, {"compute_mode": "Exclusive_Process"}])
    assert not facts.exclusive([{"compute_mode": "Default"}, {}])


def test_a_section_that_dies_midway_has_failed(report):
    path = report.scratch / "benchmark.json"

    def dies(_):
        path.write_text(json.dumps({"links": [{"a": 1}], "kernels": [{"a": 1}], "done": ["links"]}))
        return ended(1, log="ValueError: in kernels")

    def goes_on(command):
        assert command[-1:] == ["hook"]
        path.write_text(json.dumps({"hook": [{"error": "none"}], "done": ["links", "hook"]}))
        return ended()

    report.ends = [dies, goes_on]
    benchmarks.measured(report, "benchmark", ["links", "kernels", "hook"], 60)
    assert outcomes(report) == [("links", "passed"), ("kernels", "failed"), ("hook", "failed")]
    assert "in kernels" in report.results[1].message
    assert report.results[2].message == "none"
    assert report.benchmark["links"] == [{"a": 1}]


@pytest.mark.parametrize(
    ("wrong", "status"),
    [("accelerate cpu_offload", "passed"), ("distorch", "failed"), ("resident, again", "failed")],
)
def test_a_system_of_ours_must_not_fail(report, wrong, status):
    """Another system's error is told in its row. Ours is a failure of the section."""

    def run(_):
        names = ("resident", "distorch", "accelerate cpu_offload", "resident, again")
        rows = [{"system": name, "step_s": 1} for name in names if name != wrong]
        rows.append({"system": wrong, "error": "not the bits of the resident model"})
        found = {"systems": rows, "done": ["systems"]}
        (report.scratch / "benchmark.json").write_text(json.dumps(found))
        return ended()

    report.ends = [run]
    benchmarks.measured(report, "systems", ["systems"], 60)
    assert outcomes(report) == [("systems", status)]
    if status == "failed":
        assert report.results[0].message == f"{wrong}: not the bits of the resident model"
