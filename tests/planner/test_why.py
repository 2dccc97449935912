# SPDX-License-Identifier: Apache-2.0
"""Plans say why each weight lies where it lies."""

import json

import pytest
import torch
from torch import nn

import distorch


@pytest.fixture
def module():
    made = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6)))
    made.register_buffer("table", torch.zeros(3))
    made.register_parameter("count", nn.Parameter(torch.zeros(2), requires_grad=False))
    made.add_module("tied", made[0])
    return made


OPTIONS = {"keep": ["1.weight"], "rules": [("2.weight", "disk")], "offload": ["3.weight"]}
REASONS = {
    "0.weight": "'0.weight' lies on disk: of the 12.00 MiB that may leave cpu, disk gets 8.00 MiB, "
    "and weights that leave are spread evenly over the model",
    "4.weight": "'4.weight' lies on cpu: of the 12.00 MiB that may leave cpu, cpu keeps 4.00 MiB, "
    "and weights that leave are spread evenly over the model",
    "0.bias": "it has one dimension, or fewer bytes than min_bytes (1048576)",
    "table": "buffers stay on the device that computes",
    "1.weight": "keep= names it",
    "2.weight": "a rule of rules= sends it there",
    "3.weight": "offload= names it, so it must leave",
}


@pytest.mark.parametrize("name", REASONS)
def test_each_reason(module, name):
    plan = distorch.plan(module, "cpu,50%;disk,*", **OPTIONS)
    assert REASONS[name] in plan.explain(name)


def test_names_of_one_weight_have_one_reason(module):
    plan = distorch.plan(module, "cpu,50%;disk,*", **OPTIONS)
    first, tied = (plan.explain(name) for name in ("0.weight", "tied.weight"))
    assert tied.split(": ")[1] == first.split(": ")[1]


def test_where_all_fits(module):
    plan = distorch.plan(module, "cpu,*")
    assert plan.explain("0.weight") == "'0.weight' lies on cpu: it has room for all weights"


def test_other_orders(module):
    plan = distorch.plan(module, "cpu,50%;disk,*", order="sequential")
    assert "the first bytes of the model go to the first entry" in plan.explain("0.weight")


def test_integers_stay(module):
    module.register_parameter(
        "words", nn.Parameter(torch.zeros(2048, 2048, dtype=torch.int64), requires_grad=False)
    )
    plan = distorch.plan(module, "cpu,0b;disk,*")
    assert "only floating and quantised weights may leave" in plan.explain("words")


def test_a_saved_plan_still_says_it(module, tmp_path):
    plan = distorch.plan(module, "cpu,50%;disk,*", **OPTIONS)
    plan.save(tmp_path / "plan.json")
    loaded = distorch.Plan.load(tmp_path / "plan.json")
    assert [loaded.explain(name) for name in REASONS] == [plan.explain(name) for name in REASONS]


@pytest.mark.parametrize("why", [None, [], {"0.weight": 7, "0.bias": []}, {"0.weight": "because"}])
def test_a_plan_that_does_not_know(module, tmp_path, why):
    """Of an older version, or edited: it is no part of what the hash holds together."""
    plan = distorch.plan(module, "cpu,50%;disk,*")
    told = {**plan.to_dict(), "why": why}
    (tmp_path / "plan.json").write_text(json.dumps(told))
    loaded = distorch.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert "the plan does not say why" in loaded.explain("0.weight")


def test_no_such_weight(module):
    with pytest.raises(distorch.SpecError, match=r"no weight '0\.weigh'; similar.*'0\.weight'"):
        distorch.plan(module, "cpu,*").explain("0.weigh")


def test_a_report_says_it(module):
    distorch.distribute(module, "cpu,50%;disk,*")
    found = distorch.report(module)
    assert found.explain("0.weight") == distorch.plan(module, "cpu,50%;disk,*").explain("0.weight")
    assert "plan" not in found.to_dict()
