# SPDX-License-Identifier: Apache-2.0
"""Weights beside sparse tensors, and sparse tensors that are made of weights."""

import subprocess
import sys

import peft
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn

import distorch

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR):UserWarning")

DIAGONAL = torch.arange(20).repeat(2, 1)
SPECS = ["cpu,0b;disk,*", "cpu,*"]


def plain():
    torch.manual_seed(0)
    return nn.Linear(10, 20)


def sharded(spec="cpu,0b;disk,*"):
    return distorch.distribute(plain(), spec, min_bytes=0, compute="cpu")


def coo(rows, columns):
    return torch.eye(rows, columns).to_sparse()


def csr(rows, columns):
    return torch.eye(rows, columns).to_sparse_csr()


def of_bias(lin):
    return torch.sparse_coo_tensor(DIAGONAL, lin.bias, (20, 20))


def csr_of_bias(lin):
    return torch.sparse_csr_tensor(torch.arange(21), torch.arange(20), lin.bias, (20, 20))


def dense(tensor):
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


READS = {
    "dense": lambda lin: of_bias(lin),
    "coalesced": lambda lin: of_bias(lin).coalesce().values(),
    "its values": lambda lin: of_bias(lin)._values() * 2,
    "product": lambda lin: of_bias(lin) @ torch.ones(20, 3),
    "product with a vector": lambda lin: torch.mv(of_bias(lin), torch.ones(20)),
    "sum": lambda lin: torch.sparse.sum(of_bias(lin)),
    "softmax": lambda lin: torch.sparse.softmax(of_bias(lin), 1),
    "unary": lambda lin: of_bias(lin).abs(),
    "another dtype": lambda lin: of_bias(lin).double(),
    "transposed": lambda lin: of_bias(lin).t(),
    "rows of a weight": lambda lin: torch.sparse_coo_tensor(
        torch.arange(20)[None], lin.weight, (25, 10)
    ),
    "part of a weight": lambda lin: torch.sparse_coo_tensor(
        torch.arange(10).repeat(2, 1), lin.weight[:10, 0], (20, 20)
    ),
    "csr": csr_of_bias,
    "csr product": lambda lin: csr_of_bias(lin) @ torch.ones(20, 3),
    "csr sum": lambda lin: csr_of_bias(lin) + csr(20, 20),
    "bsr": lambda lin: torch.sparse_bsr_tensor(
        torch.tensor([0, 1]), torch.tensor([0]), lin.weight[None], (20, 10)
    ),
    "csr times a weight": lambda lin: csr(3, 20) @ lin.weight,
    "csc times a weight": lambda lin: torch.eye(3, 20).to_sparse_csc() @ lin.weight,
    "coo times a weight": lambda lin: coo(3, 20) @ lin.weight,
    "batches": lambda lin: torch.bmm(torch.eye(5, 20)[None].to_sparse(), lin.weight[None]),
    "mm": lambda lin: torch.sparse.mm(coo(5, 20), lin.weight),
    "hspmm": lambda lin: torch.hspmm(coo(5, 20), lin.weight),
    "smm": lambda lin: torch.smm(coo(5, 20), lin.weight),
    "sspaddmm": lambda lin: torch.sspaddmm(coo(5, 10), coo(5, 20), lin.weight),
    "addmm": lambda lin: torch.addmm(lin.weight, coo(20, 5), torch.ones(5, 10)),
    "sum with a sparse one": lambda lin: lin.weight + coo(20, 10),
    "product with a sparse one": lambda lin: lin.weight * coo(20, 10),
    "a mask": lambda lin: lin.weight.sparse_mask(coo(20, 10).coalesce()),
    "made sparse": lambda lin: lin.weight.to_sparse(),
    "made csr": lambda lin: lin.weight.to_sparse_csr(),
    "sampled": lambda lin: torch.sparse.sampled_addmm(
        torch.eye(20).to_sparse_csr(), lin.weight, lin.weight.t()
    ),
}  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", READS)
def test_reading(case, inference):
    with torch.inference_mode() if inference else torch.no_grad():
        wanted = dense(READS[case](plain()))
        for spec in SPECS:
            for _ in range(2):
                assert torch.equal(dense(READS[case](sharded(spec))), wanted)


WRITES = {
    "add_": lambda w: w.add_(coo(20, 10)),
    "sub_": lambda w: w.sub_(coo(20, 10), alpha=2),
    "mul_": lambda w: w.mul_(coo(20, 10)),
    "add_ of csr": lambda w: w.add_(csr(20, 10)),
    "addmm_": lambda w: w.addmm_(coo(20, 5), torch.ones(5, 10)),
    "out of mm": lambda w: torch.mm(coo(20, 5), torch.ones(5, 10), out=w),
    "out of add": lambda w: torch.add(torch.ones(20, 10), coo(20, 10), out=w),
    "out of addmm": lambda w: torch.addmm(w, coo(20, 5), torch.ones(5, 10), out=w),
}


@pytest.mark.parametrize("case", WRITES)
def test_writing(case):
    """To the donor, and seen by the next that asks; what is returned is the weight."""
    before = plain()
    with torch.no_grad():
        WRITES[case](before.weight.data)
        for spec in ("cpu,0b;disk,*", "cpu,*"):
            lin = sharded(spec)
            data = lin.weight.data
            assert WRITES[case](data) is data
            assert torch.equal(distorch.materialize(lin.weight), before.weight)
            x = torch.randn(2, 10)
            assert torch.equal(lin(x), before(x))


def test_a_sparse_tensor_keeps_its_values():
    """It has a copy: the ring may use that memory for other weights."""
    lin = sharded()
    with torch.no_grad():
        made = of_bias(lin)
        wanted = made.to_dense()
        for _ in range(5):
            lin(torch.randn(2, 10))
        lin.bias.data.zero_()
        assert torch.equal(made.to_dense(), wanted)


GRADIENTS = {
    "values": lambda lin: (of_bias(lin) @ torch.ones(20, 3)).sum(),
    "dense again": lambda lin: (of_bias(lin).to_dense() ** 2).sum(),
    "the other factor": lambda lin: torch.sparse.mm(coo(5, 20), lin.weight).sum(),
    "csr times a weight": lambda lin: (csr(3, 20) @ lin.weight).sum(),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case):
    one, other = plain(), sharded()
    for lin in (one, other):
        GRADIENTS[case](lin).backward()
    for name, parameter in one.named_parameters():
        gradient = other.get_parameter(name).grad
        if parameter.grad is None:
            assert gradient is None
        else:
            assert torch.equal(dense(gradient), dense(parameter.grad))


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


ADAPTERS = {
    "SHiRA": lambda: peft.ShiraConfig(target_modules=["a", "b"], r=2),
    "FRoD": lambda: peft.FrodConfig(target_modules=["a", "b"]),
}


def adapted(config, place):
    torch.manual_seed(0)
    model = peft.get_peft_model(Adapted(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    if place:
        distorch.distribute(model, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    x = torch.randn(3, 32)
    found = [model(x)]
    found[0].sum().backward()
    found += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with torch.no_grad():
        for change in (model.merge_adapter, model.unmerge_adapter):
            change()
            found.append(model(x))
    if place:  # PyTorch keeps SHiRA's weights for ever, plain ones, too: not on a donor
        distorch.undistribute(model)
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft_that_are_sparse(name):
    """Their deltas are sparse tensors of weights, and are merged into weights in place."""
    found, wanted = adapted(ADAPTERS[name](), True), adapted(ADAPTERS[name](), False)
    assert len(found) == len(wanted) > 3
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(dense(one), dense(other))


@pytest.mark.parametrize("tied", [None, {}])
def test_accelerate_sets_a_weight_of_a_distributed_model(tied):
    lin = sharded()
    bias = distorch.materialize(lin.bias)
    set_module_tensor_to_device(
        lin, "weight", "cpu", value=torch.ones(20, 10), tied_params_map=tied
    )
    x = torch.randn(2, 10)
    assert torch.equal(lin(x), nn.functional.linear(x, torch.ones(20, 10), bias))
    set_module_tensor_to_device(lin, "bias", "meta", tied_params_map=tied)
    assert lin.bias.is_meta
    set_module_tensor_to_device(lin, "bias", "cpu", value=bias, tied_params_map=tied)
    assert torch.equal(lin(x), nn.functional.linear(x, torch.ones(20, 10), bias))


def test_plain_sparse_tensors_are_as_they_were():
    """The kernels in front of PyTorch's pass everything on."""
    sharded()(torch.randn(1, 10))
    a, b = torch.randn(6, 6), torch.randn(6, 6)
    for layout in ("to_sparse", "to_sparse_csr"):
        sparse = getattr(a, layout)()
        torch.testing.assert_close(sparse @ b, a @ b)
        torch.testing.assert_close(dense(sparse + sparse), a + a)
        torch.testing.assert_close(dense(sparse * 2), a * 2)
    target = b.clone()
    target.add_(a.to_sparse())
    torch.testing.assert_close(target, a + b)
    with pytest.raises(RuntimeError):
        a.to_sparse() @ torch.randn(5, 6)


def test_nobody_is_warned():
    """PyTorch would, of kernels that take the place of others."""
    program = (
        "import torch, distorch\n"
        "lin = torch.nn.Linear(4, 4)\n"
        "distorch.distribute(lin, 'cpu,0b;disk,*', min_bytes=0, compute='cpu')(torch.ones(1, 4))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert "overrid" not in done.stderr.lower()
