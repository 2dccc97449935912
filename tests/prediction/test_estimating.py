# SPDX-License-Identifier: Apache-2.0
"""Steps that are estimated from shapes."""

from __future__ import annotations

import functools
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import distorch
from tests.prediction.programs import DTYPE, chain, inference, record, there

NAME = "rtx3090-pcie4x16-64gb"
SPEED = distorch.Machine.named(NAME).calibration.speeds[0]


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def on_meta(make):
    with torch.device("meta"):
        return make()


def estimate(module, *inputs, machine=NAME):
    with torch.no_grad(), distorch.estimate_step(module, machine) as step:
        module(*inputs)
    return step


class Call(nn.Module):
    """Runs a function with a weight."""

    def __init__(self, run, *shape, dtype=torch.float32, device="meta"):
        super().__init__()
        self.run = run
        self.w = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

    def forward(self, *inputs):
        return self.run(self.w, *inputs)


# ---- how long ------------------------------------------------------------------------


def test_the_same_step_as_the_simulator_takes():
    module = chain(6, width=1024)
    distorch.distribute(module, "sim:0,0b;cpu,*", min_bytes=0)
    distorch.calibrate(progress=False)
    x = there(4096, 1024)
    run = inference(module, x)
    run()
    recorded = record(module, run)
    with distorch.estimate_step(module) as estimated:
        run()
    assert estimated.compute == "sim:0"
    assert estimated.weights == recorded.weights
    assert estimated.forms == recorded.forms
    assert estimated.seconds == pytest.approx(recorded.seconds, rel=0.05)
    told, known = (distorch.predict(module, step) for step in (estimated, recorded))
    assert told.seconds == pytest.approx(known.seconds, rel=0.05)


@pytest.mark.parametrize(("dtype", "speed"), [
    (torch.float32, SPEED.flops), (torch.bfloat16, SPEED.half_flops), (torch.float16, SPEED.half_flops),
])  # fmt: skip
def test_large_products_take_their_arithmetic(dtype, speed):
    step = estimate(
        Call(lambda w, x: x @ w, 4096, 4096, dtype=dtype), meta(8192, 4096, dtype=dtype)
    )
    assert step.seconds == pytest.approx(2 * 8192 * 4096**2 / speed)


def test_small_products_take_their_bytes():
    step = estimate(Call(lambda w, x: x @ w, 4096, 4096), meta(1, 4096))
    nbytes = 4 * (4096 * 4096 + 2 * 4096)
    assert step.seconds == pytest.approx(nbytes / SPEED.memory)


def test_of_a_table_only_rows_are_read():
    words = meta(32, dtype=torch.int64)
    step = estimate(Call(lambda w, i: functional.embedding(i, w), 1 << 20, 1024), words)
    assert step.seconds == pytest.approx(2 * 32 * 1024 * 4 / SPEED.memory)
    assert step.uses[0].rows == 32


def test_views_take_no_time():
    assert estimate(Call(lambda w: w.t()[1:].unsqueeze(0), 512, 512)).uses == []


WORK = {
    "addbmm": (lambda w, x: torch.addbmm(w, x, x), 8 * 2 * 512**3),
    "baddbmm": (lambda w, x: torch.baddbmm(w, x, x), 8 * 2 * 512**3),
    "einsum": (lambda w, x: torch.einsum("bij,jk->bik", x, w), 8 * 2 * 512**3),
    "bilinear": (lambda w, x: functional.bilinear(x[0], x[0], w.expand(64, 512, 512)), 64 * 2 * 512**3),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_products_of_all_kinds_count(name):
    run, flops = WORK[name]
    step = estimate(Call(run, 512, 512), meta(8, 512, 512))
    assert step.seconds >= flops / SPEED.flops


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_one_operator(causal, grad):
    q = meta(2, 8, 4096, 64, dtype=DTYPE).requires_grad_(grad)
    module = Call(
        lambda w, x: functional.scaled_dot_product_attention(x, x, x, is_causal=causal), 1
    )
    with torch.set_grad_enabled(grad), distorch.estimate_step(module, NAME) as step:
        out = module(q)
        if grad:
            out.sum().backward()
    flops = 2 * 2 * 8 * 4096**2 * 64 * 2 / (2 if causal else 1)
    nbytes = 4 * q.nbytes
    forward = max(flops / SPEED.half_flops, nbytes / SPEED.memory)
    if not grad:
        assert [use.operators for use in step.uses] == [1]
        assert step.seconds == pytest.approx(forward)
    else:
        assert out.shape == q.shape
        assert q.grad is None or q.grad.shape == q.shape
        assert 3 * forward < step.seconds < 5 * forward


def test_a_norm_is_one_operator():
    module = on_meta(lambda: nn.RMSNorm(512))
    step = estimate(module, meta(64, 512))
    assert [(use.operators, use.weights) for use in step.uses] == [(1, ("weight",))]


def test_autocast_shortens_products():
    module = Call(lambda w, x: functional.linear(x, w), 1024, 1024, device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16), distorch.estimate_step(module, NAME) as step:
        assert module(meta(8192, 1024)).dtype == torch.bfloat16
    assert step.seconds == pytest.approx(2 * 8192 * 1024**2 / SPEED.half_flops)


def test_a_backward_pass_uses_weights_again():
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(8, 64, requires_grad=True)
    with distorch.estimate_step(module, NAME) as step:
        module(x).sum().backward()
    assert sum("0.weight" in use.weights for use in step.uses) == 2
    assert x.grad is None
    assert all(p.grad is None for p in module.parameters())


# ---- wherever the module is ----------------------------------------------------------


def test_it_does_not_matter_where_the_module_is():
    def make():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(36, 36), nn.GELU()
        ).eval()

    here, spread = make(), make()
    distorch.distribute(spread, "cpu,0b;disk,*", min_bytes=0, compute="cpu")
    steps = [
        estimate(module, x)
        for module in (here, spread, on_meta(make))
        for x in (torch.randn(4, 3, 8, 8), meta(4, 3, 8, 8))
    ]
    for step in steps[1:]:
        assert step.weights == steps[0].weights
        assert step.forms == steps[0].forms
        assert step.seconds == pytest.approx(steps[0].seconds, rel=0.1, abs=2e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_on_the_cpu(kind):
    step = estimate(kind(256, 256, batch_first=True), torch.randn(16, 8, 256))
    gates = 4 if kind is nn.LSTM else 3
    assert step.seconds >= 2 * 16 * 8 * gates * 2 * 256**2 / SPEED.flops


def test_nothing_is_computed():
    module = nn.Linear(4096, 4096, bias=False)
    with torch.no_grad(), distorch.estimate_step(module, NAME):
        out = module(torch.zeros(1, 4096).expand(1 << 24, 4096))  # 256 GiB
    assert out.is_meta
    assert out.shape == (1 << 24, 4096)


# ---- the module is as before ---------------------------------------------------------


class Caches(nn.Module):
    """Keeps what it computes in every way that models do."""

    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("lazy", None)
        self.freqs, self.by_length, self.nested = None, {}, {"a": [torch.ones(8)]}
        self.plain = torch.ones(8)

    @functools.cached_property
    def derived(self):
        return self.lin.weight.detach().sum(0)

    def forward(self, x):
        n = x.shape[0]
        self.counter += 1
        self.plain.mul_(1.5)
        if self.lazy is None:
            self.lazy = torch.arange(n, device=x.device).float()
        if self.freqs is None:
            self.freqs = self.lin.weight.detach().mean() * torch.arange(n)
        if n not in self.by_length:
            self.by_length[n] = self.freqs.cos()
        self.nested["a"].append(self.freqs)
        y = self.norm(self.lin(x)) + self.derived + self.plain
        return y + (self.lazy + self.freqs + self.by_length[n])[:, None]


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_as_before(fails):
    x = torch.linspace(-1, 1, 40).view(5, 8)
    module, other = Caches().train(), Caches().train()
    other.load_state_dict(module.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mine") if fails else torch.no_grad():  # noqa: SIM117
        with distorch.estimate_step(module, NAME):
            module(x)
            if fails:
                raise RuntimeError("mine")
    assert torch.equal(torch.get_rng_state(), state)
    assert module.lazy is None
    assert module.by_length == {}
    assert len(module.nested["a"]) == 1
    for ours, theirs in itertools.zip_longest(module.buffers(), other.buffers()):
        assert torch.equal(ours, theirs)
    assert torch.equal(module(x), other(x))
    assert torch.equal(module.norm.running_var, other.norm.running_var)


def test_gradients_and_data_are_as_before():
    module = on_meta(lambda: nn.Linear(8, 8))
    with distorch.estimate_step(module, NAME):
        module(meta(4, 8)).sum().backward()
    assert all(p.grad is None for p in module.parameters())

    class Sets(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.ones(3))

        def forward(self, x):
            self.mean.data = torch.zeros(3)
            return x

    module = Sets()
    estimate(module, torch.zeros(3))
    assert torch.equal(module.mean, torch.ones(3))


def test_no_module_is_changed_in_the_block():
    module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    for change in (
        lambda: distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, compute="cpu"),
        lambda: distorch.undistribute(distorch.distribute(nn.Linear(8, 8), "cpu,*")),
    ):
        refused = pytest.raises(distorch.PlacementError, match="no module can be changed in the")
        with refused, distorch.estimate_step(module, NAME):
            change()
    assert not any(distorch.is_sharded(p) for p in module.parameters())
    distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, compute="cpu")


def test_what_another_thread_places_stays():
    module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))

    def place():
        distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, compute="cpu", progress=False)

    refused = pytest.raises(distorch.PlacementError, match="placed anew while its step was")
    with refused, distorch.estimate_step(module, NAME):
        thread = threading.Thread(target=place)
        thread.start()
        thread.join()
    assert distorch.report(module).ok


def test_an_optimizer_takes_no_step():
    module = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    refused = pytest.raises(distorch.PlacementError, match="an optimizer would keep tensors")
    with refused, distorch.estimate_step(module, NAME):
        module(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    before = module.weight.clone()
    module(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)


# ---- as a real step would ------------------------------------------------------------


def test_layers_of_attention_are_as_fast_as_attention():
    layer = nn.MultiheadAttention(512, 8, batch_first=True, bias=False).eval()
    x = torch.zeros(1, 4096, 512)
    with torch.no_grad(), distorch.estimate_step(layer, NAME) as step:
        layer(x, x, x, need_weights=False)
    products = 2 * 4096 * 512 * 4 * 512 / SPEED.flops
    scores = 2 * 2 * 4096**2 * 512 / SPEED.flops
    assert step.seconds == pytest.approx(products + scores, rel=0.1)
    assert step.weights == ("in_proj_weight", "out_proj.weight")


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_in_the_backward_pass(reentrant):
    first, module = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    whole = nn.Sequential(first, module)
    with distorch.estimate_step(whole, NAME) as step:
        checkpoint(module, first(torch.randn(8, 64)), use_reentrant=reentrant).sum().backward()
    assert sum("1.0.weight" in use.weights for use in step.uses) == 3


def test_training_under_autocast():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16), distorch.estimate_step(module, NAME) as step:
        module(torch.randn(8, 64)).float().sum().backward()
    assert sum("1.weight" in use.weights for use in step.uses) == 2


def test_attention_under_autocast():
    def run(w, x):
        return functional.scaled_dot_product_attention(x, x, x)

    x = meta(1, 8, 4096, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = estimate(Call(run, 1), x)
    assert half.uses[-1].seconds < 0.6 * estimate(Call(run, 1), x).seconds


def test_attention_with_a_batch_that_is_repeated():
    q, k = meta(1, 4, 16, 8).requires_grad_(), meta(3, 4, 16, 8)
    module = Call(lambda w: functional.scaled_dot_product_attention(q, k, k), 1)
    with distorch.estimate_step(module, NAME):
        out = module()
        out.sum().backward()
    assert out.shape == (3, 4, 16, 8)


BYTES = {
    "copy_": (lambda w, x: x.copy_(w), 2),
    "zero_": (lambda w, x: x.zero_(), 1),
    "full_like": (lambda w, x: torch.full_like(x, 1.0), 1),
    "clone": (lambda w, x: x.clone(), 2),
    "add": (lambda w, x: x + w, 3),
    "add_": (lambda w, x: x.add_(w), 3),
    "foreach": (lambda w, x: torch._foreach_add_([x], [w]), 3),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_read_and_written(name):
    run, times = BYTES[name]
    step = estimate(Call(run, 1024, 1024), meta(1024, 1024))
    assert step.seconds == pytest.approx(times * 4 * 1024**2 / SPEED.memory)


def test_one_token_into_a_cache():
    cache, token = meta(4096, 1024), meta(1, 1024)
    step = estimate(Call(lambda w: cache.index_copy_(0, torch.tensor([7]), token), 1))
    assert step.seconds < 20 * token.nbytes / SPEED.memory


def test_inputs_from_ram_travel():
    module = chain(2, width=256)
    distorch.distribute(module, "sim:0,*", min_bytes=0)
    distorch.calibrate(progress=False)
    x = torch.zeros(1024, 256, dtype=DTYPE)
    with torch.no_grad(), distorch.estimate_step(module) as step:
        module(x.to("sim:0"))
    assert step.uses[0].copied == x.nbytes


# ---- what needs numbers --------------------------------------------------------------

NUMBERS = {
    "item": lambda y: y.sum().item(),
    "int": lambda y: int(y.sum()),
    "if": lambda y: bool(y.sum() > 0),
    "tolist": lambda y: y[0].tolist(),
    "numpy": lambda y: y.cpu().numpy(),
    "format": lambda y: f"{y.sum():.3f}",
    "boolean index": lambda y: y[y > 0],
    "nonzero": torch.nonzero,
    "unique": torch.unique,
    "tensor of numbers": lambda y: torch.tensor([y.sum(), y.sum()]),
    "equal": lambda y: torch.equal(y, y),
    "repeat": lambda y: torch.repeat_interleave(y, y.sum(1).long(), dim=0),
}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_step_that_needs_numbers_is_refused(name, where):
    module = nn.Linear(8, 8, device=where)
    with pytest.raises(
        distorch.PlacementError, match=r"needs numbers that were not computed|shapes"
    ):
        estimate(nn.Sequential(module, _Then(NUMBERS[name])), torch.randn(4, 8))


class _Then(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, y):
        self.run(y)
        return y


def test_numbers_that_no_weight_takes_part_in_are_known():
    seen = []

    def run(w, x):
        positions = torch.arange(x.shape[0], device=x.device)
        seen.append((positions[positions > 2].tolist(), int((positions == 0).sum())))
        return x @ w

    estimate(Call(run, 8, 8), torch.randn(5, 8))
    assert seen == [([3, 4], 1)]


def test_numbers_that_the_step_writes_itself():
    seen = []

    def run(w, x):
        n = torch.tensor(2)
        n += 3
        places = torch.tensor([0, 0])
        places[0] = 4
        seen.append((int(n), places.tolist()))
        return x[: int(n)] @ w

    estimate(Call(run, 8, 8), torch.randn(9, 8))
    assert seen == [(5, [4, 0])]


def test_numbers_that_were_not_written_are_not_read():
    ids = torch.tensor([1, 2])

    def run(w):
        ids[0] = 9
        return ids.tolist()

    def run_with_weight(w):
        ids[:] = w[:2].long()
        return int(ids[0])

    for program in run, run_with_weight:
        with pytest.raises(distorch.PlacementError, match="needs numbers"):
            estimate(Call(program, 8))
        assert ids.tolist() == [1, 2]


def test_a_backward_pass_wants_a_number():
    module = nn.Linear(8, 8)
    with distorch.estimate_step(module, NAME):
        y = module(torch.randn(4, 8))
        with pytest.raises(RuntimeError, match="only for scalar outputs"):
            y.backward()
        y.backward(gradient=torch.ones(4, 8))
        torch.autograd.backward([module(torch.randn(4, 8)).sum()], inputs=list(module.parameters()))


def test_operators_of_higher_order_are_refused():
    with pytest.raises(distorch.PlacementError, match="cannot be run on shapes alone"):
        estimate(
            Call(lambda w, x: torch.cond(x.sum() > 2, lambda: x @ w, lambda: x), 8, 8), meta(4, 8)
        )


def test_dtypes_that_do_not_fit_are_refused():
    with pytest.raises(distorch.PlacementError, match="which a real step refuses"):
        estimate(Call(lambda w, x: x @ w, 8, 8, dtype=torch.bfloat16), meta(4, 8))


def test_errors_of_the_model_come_through():
    with pytest.raises(RuntimeError, match="same reduction dim"):
        estimate(Call(lambda w, x: x @ w, 8, 8), meta(4, 9))


def test_this_machine_has_to_be_measured():
    with pytest.raises(distorch.PlacementError, match=r"distorch.calibrate\(\)"):
        estimate(on_meta(lambda: nn.Linear(8, 8)), meta(4, 8), machine=None)
