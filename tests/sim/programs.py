# SPDX-License-Identifier: Apache-2.0
"""Random programs on the simulator: models, placements, orders, threads, writes, faults.

`run_program(seed)` makes one from a seed, runs it beside the same model on the CPU, and checks
that everything is the same, or ends in a named error that leaves everything as it was.
"""

from __future__ import annotations

import copy
import gc
import random
import threading

import torch
from torch import nn

import distorch
from distorch.testing import sim

NAMED = (distorch.DistorchError, torch.OutOfMemoryError)
WIDTH = 16


class Program(nn.Module):
    """Layers that are used in whatever order is asked for."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self._layer(rng) for _ in range(rng.randint(2, 9)))
        if rng.random() < 0.3:  # tied
            self.layers.append(nn.Linear(WIDTH, WIDTH))
            self.layers[-1].weight = next(
                (m.weight for m in self.layers if isinstance(m, nn.Linear)), self.layers[-1].weight
            )

    @staticmethod
    def _layer(rng: random.Random) -> nn.Module:
        kind = rng.choice(["linear", "linear", "wide", "norm", "embedding", "conv"])
        if kind == "linear":
            return nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.5)
        if kind == "wide":
            hidden = WIDTH * rng.randint(2, 40)
            return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH))
        if kind == "norm":
            return nn.LayerNorm(WIDTH)
        if kind == "embedding":
            return nn.Embedding(30, WIDTH)
        return nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for index in order:
            layer = self.layers[index % len(self.layers)]
            if isinstance(layer, nn.Embedding):
                x = x + layer(torch.arange(len(x), device=x.device))
            elif isinstance(layer, nn.Conv1d):
                x = layer(x.t()[None])[0].t()
            else:
                x = layer(x)
        return x


def _configure(rng: random.Random) -> None:
    links = {("cpu", "sim:0"): (rng.choice([1e6, 1e9, 50e9]), rng.choice([0.0, 1e-5]))}
    if rng.random() < 0.5:
        links["sim:1", "sim:0"] = (rng.choice([1e7, 50e9]), 1e-6)
    shared = [{("cpu", "sim:0"), ("cpu", "sim:1")}] if rng.random() < 0.3 else []
    sim.configure(
        devices=2, memory="1gb", flops=rng.choice([1e8, 1e12]), links=links, shared=shared,
        mode=rng.choice(["deferred", "deferred", "eager"]),
    )  # fmt: skip


def _spec(rng: random.Random) -> str:
    donors = rng.sample(["cpu", "sim:1", "disk"], rng.randint(1, 3))
    entries = [f"sim:0,{rng.choice(['0b', '1kb', '4kb', '20kb'])}"]
    entries += [f"{donor},{rng.choice([1, 3, 9])}kb" for donor in donors[:-1]]
    return ";".join([*entries, f"{donors[-1]},*"])


def _order(rng: random.Random, known: list[list[int]]) -> list[int]:
    if known and rng.random() < 0.7:
        return rng.choice(known)
    known.append([rng.randrange(12) for _ in range(rng.randint(1, 12))])
    return known[-1]


class Run:
    """One program and its twin on the CPU."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        _configure(self.rng)
        self.plain = Program(self.rng)
        self.there = copy.deepcopy(self.plain)
        self.orders: list[list[int]] = []
        self.refused = 0

    def distribute(self) -> None:
        self.options = {"min_bytes": self.rng.choice([0, 0, 2000])}
        self.options["prefetch"] = self.rng.choice(["auto", 0, 512, 4096, 30_000])
        distorch.distribute(self.there, _spec(self.rng), **self.options)

    def attempt(self, action) -> bool:
        """Whether it went well; a named error is the only other way."""
        try:
            action()
        except NAMED:
            self.refused += 1
            return False
        except RuntimeError as error:  # a copy of the program's own, not of a weight
            if "injected fault" not in str(error):
                raise
            self.refused += 1
            return False
        return True

    def forward(self) -> None:
        x = torch.randn(5, WIDTH)
        order = _order(self.rng, self.orders)
        got: list[torch.Tensor] = []
        with torch.no_grad():
            if self.attempt(lambda: got.append(self.there(x.to("sim:0"), order).cpu())):
                assert torch.equal(got[0], self.plain(x, order))

    def backward(self) -> None:
        """Against the model resident on the same device: its autograd adds in its own order."""
        x, order = torch.randn(5, WIDTH), _order(self.rng, self.orders)

        def train(module: nn.Module) -> None:
            module(x.to("sim:0"), order).square().sum().backward()

        self.there.zero_grad(set_to_none=True)
        if not self.attempt(lambda: train(self.there)):
            return
        self.calm()
        resident = distorch.distribute(copy.deepcopy(self.plain), "sim:0,*")
        train(resident)
        wanted = {name: p.grad for name, p in resident.named_parameters()}
        for name, parameter in self.there.named_parameters():
            assert (parameter.grad is None) == (wanted[name] is None), name
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, wanted[name]), name

    def write(self) -> None:
        names = [name for name, _ in self.plain.named_parameters()]
        name = self.rng.choice(names)
        delta = torch.randn(())
        with torch.no_grad():
            there, plain = self.there.get_parameter(name), self.plain.get_parameter(name)
            if self.attempt(lambda: there.add_(delta.item())):
                plain.add_(delta.item())

    def redistribute(self) -> None:
        spec = _spec(self.rng)
        self.attempt(lambda: distorch.redistribute(self.there, spec))
        report = distorch.report(self.there)
        # What is small may be more than the share of the compute device: that is all it may say.
        over = [
            problem for problem in report.problems if "smaller than min_bytes (2000)" in problem
        ]
        assert report.problems == over, report.problems

    def threads(self) -> None:
        x = torch.randn(5, WIDTH)
        orders = [_order(self.rng, self.orders) for _ in range(2)]
        results: dict[int, torch.Tensor] = {}

        def work(index: int) -> None:
            with torch.no_grad():
                self.attempt(
                    lambda: results.update({index: self.there(x.to("sim:0"), orders[index]).cpu()})
                )

        workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        with torch.no_grad():
            for index, got in results.items():
                assert torch.equal(got, self.plain(x, orders[index]))

    def fault(self) -> None:
        """Something breaks during the next actions."""
        what = self.rng.choice(["copy", "alloc", "slow"])
        if what == "slow":
            start = sim.now()
            sim.slow(("cpu", "sim:0"), factor=10, start=start, end=start + 1e-3)
        else:
            sim.fail(what, nth=self.rng.randint(1, 6))

    @staticmethod
    def calm() -> None:
        """Faults that did not happen yet will not."""
        sim.fail("copy", nth=0)
        sim.fail("alloc", nth=0)

    def finish(self) -> None:
        self.calm()
        x, order = torch.randn(5, WIDTH), list(range(len(self.plain.layers)))
        with torch.no_grad():
            assert torch.equal(self.there(x.to("sim:0"), order).cpu(), self.plain(x, order))
        assert_same_values(self.there, self.plain)
        distorch.undistribute(self.there)
        with torch.no_grad():
            assert torch.equal(self.there(x.to("sim:0"), order).cpu(), self.plain(x, order))
        del self.there
        assert_nothing_is_left()


def assert_same_values(there: nn.Module, plain: nn.Module) -> None:
    """Every entry of the state dicts, wherever the one model is."""
    wanted = plain.state_dict()
    assert all(torch.equal(v.cpu(), wanted[k]) for k, v in there.state_dict().items())


def assert_nothing_is_left() -> None:
    """After the last model: no memory of a device, no pinned memory, and no race on the way."""
    gc.collect()
    sim.synchronize()
    assert torch.sim.memory_allocated("sim:0") == 0
    assert torch.sim.memory_allocated("sim:1") == 0
    assert sim.pinned_bytes() == 0
    assert sim.races() == [], sim.races()


def run_program(seed: int) -> int:
    """Runs one; returns how many actions ended in a named error."""
    run = Run(seed)
    run.distribute()
    actions = [run.forward] * 5 + [
        run.backward,
        run.write,
        run.redistribute,
        run.threads,
        run.fault,
    ]
    for _ in range(run.rng.randint(3, 10)):
        run.rng.choice(actions)()
    run.finish()
    return run.refused
