"""Every architecture: the same bits forward and backward with all weights on disk."""

import copy

import pytest
import torch

import distorch

from .zoo import zoo

ZOO = zoo()


def run(module, call):
    """Outputs and gradients of one forward and backward."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    outputs = call(module)
    torch.stack(
        [out.float().square().mean() for out in outputs if out.requires_grad]
    ).sum().backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return [out.detach().clone() for out in outputs], gradients


def assert_same(got, wanted):
    assert len(got[0]) == len(wanted[0]) > 0
    for a, b in zip(got[0], wanted[0], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert got[1].keys() == wanted[1].keys() and wanted[1]
    for name in wanted[1]:
        assert torch.equal(got[1][name], wanted[1][name]), name


@pytest.mark.parametrize("name", sorted(ZOO))
def test_all_on_disk(name):
    module, call = ZOO[name]()
    module.eval()
    twin = copy.deepcopy(module)
    wanted = run(module, call)
    distorch.distribute(twin, "cpu,0b;disk,*", min_bytes=0)
    report = distorch.report(twin)
    assert report.ok, report.problems
    assert report.bytes["disk"] > 0
    left = [
        n
        for n, p in twin.named_parameters()
        if p.is_floating_point() and p.numel() and not distorch.is_sharded(p)
    ]
    assert left == []
    for _ in range(2):
        assert_same(run(twin, call), wanted)
    for mode in (torch.no_grad, torch.inference_mode):  # other kernels than with gradients
        with mode():
            torch.manual_seed(3)
            plain = call(module)
            torch.manual_seed(3)
            for a, b in zip(call(twin), plain, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
    distorch.undistribute(twin)
    assert_same(run(twin, call), wanted)


def test_there_are_many():
    assert len(ZOO) >= 60
