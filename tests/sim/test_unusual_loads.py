# SPDX-License-Identifier: Apache-2.0
"""Many threads on one ring, and donors of very different speed."""

import torch

import distorch
from distorch.testing import sim
from tests.reliability.test_reliability import X, chain, check_many_threads


def test_many_threads_on_many_models_of_one_ring():
    check_many_threads("sim:0", "sim:0,0b;cpu,*")
    assert sim.races() == []


def test_a_donor_that_is_slower_by_a_hundred_times():
    """The numbers are the same, and a step takes as long as the slow link needs for its share."""
    slow = 1e7
    sim.configure(
        devices=2, links={("cpu", "sim:0"): (1e9, 1e-6), ("sim:1", "sim:0"): (slow, 1e-6)}
    )
    model = chain(8)
    x = X.to("sim:0")
    with torch.no_grad():
        wanted = copy_of(model).to("sim:0")(x).cpu()
        distorch.distribute(model, "sim:0,0b;cpu,50%;sim:1,50%", min_bytes=0, prefetch="64kb")
        for _ in range(2):
            assert torch.equal(model(x).cpu(), wanted)
        begin = sim.now()
        assert torch.equal(model(x).cpu(), wanted)
        seconds = sim.now() - begin
    there = distorch.report(model).bytes["sim:1"]
    assert there > 0 and there / slow <= seconds <= 1.2 * there / slow


def copy_of(model):
    made = chain(len(model))
    made.load_state_dict(model.state_dict())
    return made
