# SPDX-License-Identifier: Apache-2.0
"""Models on a GPU: the same bits as resident, whatever the streams do."""

import shutil

import pytest
import torch

import distorch
from tests.accelerator.models import *  # noqa: F403
from tests.accelerator.models import batch, net

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="torch.compile on a GPU needs a C compiler, and none is on the PATH",
)


def compiled_result(machine):
    """A streamed model, an input, and what the resident model makes of it, compiled."""
    model = distorch.distribute(net(machine.dtype), "cuda:0,0b;cpu,*", min_bytes=0)
    x = batch(machine)
    with torch.no_grad():
        return model, x, torch.compile(net(machine.dtype).cuda(), fullgraph=True)(x)


@needs_a_compiler
def test_compiled(machine):
    model, x, wanted = compiled_result(machine)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(x), wanted)


@needs_a_compiler
def test_reduce_overhead_captures_what_lies_between_fetches(machine):
    """mode="reduce-overhead": graphs are cut at fetches, and every step fetches again."""
    model, x, wanted = compiled_result(machine)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            before = distorch.stats(model).fetches
            assert torch.equal(compiled(x), wanted)
            assert distorch.stats(model).fetches > before
