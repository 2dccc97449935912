# SPDX-License-Identifier: Apache-2.0
"""Random programs that never wait: changes of a model right behind forwards that still run.

`run_program(seed)` makes one from a seed. Forwards are only issued, on several streams and from
two threads, and their results are looked at when the program ends. Meanwhile the weights are
written to, moved, patched, or let go of. The same is done to a model on the CPU, one after the other.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Iterator

import torch
from torch import nn

import distorch
from distorch import _ops
from distorch.testing import sim

from .programs import WIDTH, Program, assert_nothing_is_left, assert_same_values

PLACES = ["sim:0,0b", "sim:0,4kb", "sim:0,40%"]
DONORS = ["cpu", "disk", "sim:1", "cpu+sim:1"]
STRENGTH = 0.5


def _configure(rng: random.Random) -> None:
    """Links so slow that nothing has arrived when the next line runs."""
    links = {("cpu", "sim:0"): (rng.choice([1e6, 1e8, 1e10]), 1e-5)}
    links["sim:0", "cpu"] = (rng.choice([1e7, 1e10]), 1e-5)
    if rng.random() < 0.7:
        links["sim:1", "sim:0"] = (rng.choice([1e7, 1e10]), 1e-6)
    disk = (rng.choice([1e7, 3e9]), 1e-5)
    flops = rng.choice([1e7, 1e12])
    sim.configure(devices=2, memory="1gb", flops=flops, links=links, disk=disk)


class Behind:
    """One program: a model on the device, and what it should be on the CPU.

    `plain` has the weights without LoRAs, `patched` those with them, while there are some.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        _configure(self.rng)
        self.plain = Program(self.rng)
        self.there = self._offloaded()
        self.streams = [torch.Stream(device="sim:0") for _ in range(2)]
        self.results: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done: list[str] = []

    def _spec(self) -> str:
        donors = self.rng.sample(DONORS, self.rng.randint(1, 2))
        entries = [self.rng.choice(PLACES)]
        entries += [f"{donor},{self.rng.choice([1, 9])}kb" for donor in donors[:-1]]
        return ";".join([*entries, f"{donors[-1]},*"])

    def _offloaded(self) -> nn.Module:
        self.patched: nn.Module | None = None
        prefetch = self.rng.choice(["auto", 0, 4096, 30_000])
        model = copy.deepcopy(self.plain)
        return distorch.distribute(model, self._spec(), min_bytes=0, prefetch=prefetch)

    def _order(self) -> list[int]:
        return [self.rng.randrange(12) for _ in range(self.rng.randint(1, 8))]

    def issue(self, model: nn.Module, x: torch.Tensor, order: list[int]) -> None:
        """Nothing of it needs to have ended when this returns."""
        with torch.no_grad():
            wanted = (self.patched or self.plain)(x, order)
            self.results.append((model(x.to("sim:0"), order), wanted))

    def forward(self) -> None:
        self.issue(self.there, torch.randn(5, WIDTH), self._order())

    def forward_on_a_stream(self) -> None:
        with self.rng.choice(self.streams):
            self.forward()

    def threads(self) -> None:
        """Two threads with a stream each. They end, what they issued does not."""
        work = [(torch.randn(5, WIDTH), self._order()) for _ in range(2)]

        def run(index: int) -> None:
            with self.streams[index]:
                self.issue(self.there, *work[index])

        before = len(self.results)
        workers = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(self.results) == before + len(workers)  # an error in a thread is only printed

    def _without_loras(self) -> None:
        if self.patched is not None:
            distorch.set_loras(self.there, [])
            self.patched = None

    def _names(self) -> list[str]:
        names = [name for name, _ in self.plain.named_parameters()]
        return self.rng.sample(names, self.rng.randint(1, len(names)))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around writes: streams that use the same weights are the user's to order, as in PyTorch.
        Copies from donors, on streams that the user does not know, are not.
        """
        self._without_loras()
        here = torch.accelerator.current_stream("sim:0")
        for stream in self.streams:
            here.wait_stream(stream)
        yield
        for stream in self.streams:
            stream.wait_stream(here)

    def copy(self) -> None:
        for name in self._names():
            ours, plain = self.there.get_parameter(name), self.plain.get_parameter(name)
            value = torch.randn(plain.shape) / 4
            with torch.no_grad():
                if self.rng.random() < 0.5:
                    ours.copy_(value)
                else:
                    ours.mul_(0.5).add_(value.to("sim:0"))
                    value = plain * 0.5 + value
                plain.copy_(value)

    def load_state_dict(self) -> None:
        state = {name: torch.randn_like(p) / 4 for name, p in self.plain.state_dict().items()}
        self.plain.load_state_dict(state)
        self.there.load_state_dict(self.plain.state_dict())  # in which tied weights are one

    def step(self) -> None:
        gradients = {name: torch.randn_like(p) / 4 for name, p in self.plain.named_parameters()}
        for model, device in ((self.there, "sim:0"), (self.plain, "cpu")):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].to(device)
            torch.optim.SGD(model.parameters(), lr=0.125, foreach=False).step()
            model.zero_grad(set_to_none=True)

    def give_data(self) -> None:
        """`.data =`: the weight is a plain one on the device, until it is placed again."""
        for name in self._names():
            value = torch.randn(self.plain.get_parameter(name).shape) / 4
            # PyTorch itself refuses `.data = ` for devices such as this one.
            _ops.set_data(self.there.get_parameter(name), value.to("sim:0"))
            self.plain.get_parameter(name).data = value
        distorch.redistribute(self.there, self._spec())

    def redistribute(self) -> None:
        distorch.redistribute(self.there, self._spec())

    def set_loras(self) -> None:
        self._without_loras()
        mode = self.rng.choice(["merge", "fetch", "background"])
        targets = [
            (name, module)
            for name, module in self.plain.named_modules()
            if isinstance(module, nn.Linear)
        ]
        lora = {}
        for name, module in targets:
            lora[f"{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            lora[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
        if not lora or len({id(module.weight) for _, module in targets}) < len(targets):
            return  # a tied weight has one patch
        twin = distorch.distribute(copy.deepcopy(self.plain), "cpu,*", compute="cpu", min_bytes=0)
        self.patched = distorch.set_loras(twin, [(lora, STRENGTH)])
        distorch.set_loras(self.there, [(lora, STRENGTH)], lora_mode=mode)

    def copies(self) -> None:
        """Another model, which shares what can be shared, runs and is let go of."""
        twin = copy.deepcopy(self.there)
        self.issue(twin, torch.randn(5, WIDTH), self._order())

    def begin_again(self) -> None:
        """The model goes: plain first, or as it is."""
        if self.rng.random() < 0.5:
            distorch.undistribute(self.there, self.rng.choice(["cpu", "sim:0"]))
        for stream in self.streams:  # may read plain weights on the device
            torch.accelerator.current_stream("sim:0").wait_stream(stream)
        self.there = self._offloaded()

    def finish(self) -> None:
        distorch.finish_merging(self.there)
        report = distorch.report(self.there)
        assert report.ok, report.problems
        sim.synchronize()
        right = [torch.equal(got.cpu(), wanted) for got, wanted in self.results]
        assert all(right), right
        self._without_loras()
        assert_same_values(self.there, self.plain)
        self.results.clear()
        del self.there, self.patched
        assert_nothing_is_left()


def run_program(seed: int) -> None:
    """Runs one. An error says which actions led there."""
    run = Behind(seed)
    forwards = [run.forward, run.forward_on_a_stream, run.threads]
    writes = [run.copy, run.load_state_dict, run.step, run.give_data]
    changes = [*writes, run.redistribute, run.set_loras, run.copies, run.begin_again]
    try:
        for _ in range(run.rng.randint(2, 8)):
            for action in (run.rng.choice(forwards), run.rng.choice(changes)):
                run.done.append(action.__name__)
                if action in writes:
                    with run.writing():
                        action()
                else:
                    action()
        run.done.append("finish")
        run.finish()
    except BaseException as error:
        error.add_note(f"after {', '.join(run.done)}")
        raise
