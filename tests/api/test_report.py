# SPDX-License-Identifier: Apache-2.0
"""What a report says beside its table is so."""

import pytest
import torch
from torch import nn

import distorch


@pytest.mark.parametrize("prefetch", ["auto", "40kb"])
@pytest.mark.parametrize(("count", "width"), [(12, 64), (5, 200), (30, 37)])
def test_what_fits_into_the_ring_is_fetched_once(count, width, prefetch):
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    distorch.distribute(model, "cpu,20%;disk,*", min_bytes=0, prefetch=prefetch)
    x = torch.randn(2, width)
    model(x)
    model(x)
    distorch.reset_stats(model)
    model(x)
    travelled = sum(distorch.stats(model).bytes.values())
    said = str(distorch.report(model))
    assert "look-ahead: up to" in said
    assert ("it is fetched once and stays there" in said) == (travelled == 0)
    assert (travelled == 0) == (prefetch == "auto")


def test_a_resident_model_has_no_look_ahead():
    model = distorch.distribute(nn.Sequential(nn.Linear(64, 64)), "cpu,*", min_bytes=0)
    assert "look-ahead" not in str(distorch.report(model))
