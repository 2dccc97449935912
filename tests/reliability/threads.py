# SPDX-License-Identifier: Apache-2.0
"""python -m tests.reliability.threads [PROGRAMS]: random programs of two to eight threads.

The threads do what users do, at random, to a few models that share one ring. Every output has to be
the one of a state that the model was in meanwhile. At the end nothing is left. A process of its own
runs the programs. If it stands still, the stacks of all its threads are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import os
import random
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from tests.reliability import watchdog

WIDTH = 64
MODES = ("merge", "fetch", "background")
SPECS = {
    "cpu": ("cpu,0b;disk,*", "cpu,*", "cpu,50%;disk,50%", "cpu,10%;disk,90%"),
    "sim:0": (
        "sim:0,0b;cpu,*", "sim:0,0b;disk,*", "sim:0,30%;cpu,30%;disk,*", "sim:0,0b;cpu+sim:1,*",
        "sim:0,0b;sim:1,30%;cpu,*", "sim:0,*",
    ),
}  # fmt: skip
FORK_SECONDS = 30  # a child takes some ms
KINDS = ("float32", "float8", "bfloat16")

State = tuple[str, str]  # the weights, "first" or "second", and the LoRA: "", "a" or "b"
FIRST: State = ("first", "")

# What may not run at the same time on one model. What changes a model may run beside its forward
# passes, and beside other changes. The rest is in docs/modules.md.
CHANGES = ("redistribute", "set_loras")
ALL = (*CHANGES, "forward", "backward", "copy", "save", "fork", "trace", "whole", "reload", "write")
APART = {
    *((one, change) for one in ("backward", "copy", "save", "fork") for change in CHANGES),
    *(("reload", other) for other in (*CHANGES, "backward", "copy", "save", "fork")),
    *(("whole", other) for other in ALL if other != "forward"),
    *(("write", other) for other in ALL),
}

# What threads do on streams of their own. Changes are made on the default stream.
ON_STREAMS = ("forward", "backward", "trace", "wrong")


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)]
    return nn.Sequential(*layers).to(dtype).eval()


class Setting:
    """A file with weights, LoRAs for them, and what the outputs are in every state."""

    def __init__(self, device: str, kind: str, folder: Path) -> None:
        self.device, self.kind = device, kind
        self.dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        self.file = folder / f"{kind}.safetensors"
        state = net(self.dtype).state_dict()
        if kind == "float8":
            matrices = [name for name, value in state.items() if value.dim() == 2]
            state |= {name: state[name].to(torch.float8_e4m3fn) for name in matrices}
            state |= {f"{name}_scale": torch.tensor(0.5) for name in matrices}
        save_file(state, self.file)
        dice = torch.Generator().manual_seed(1)
        self.second = {
            name: (torch.randn(value.shape, generator=dice) / 8).to(self.dtype)
            for name, value in net().state_dict().items()
        }
        linear = [name for name, part in net().named_modules() if isinstance(part, nn.Linear)]
        self.loras = {
            name: self._lora(linear if name == "a" else linear[::2], dice) for name in "ab"
        }
        self.x = torch.randn(2, WIDTH, generator=dice).to(self.dtype)
        self.outputs: dict[State, torch.Tensor] = {}
        self.gradients: dict[State, torch.Tensor] = {}
        for weights in ("first", "second"):
            for lora in ("", "a", "b"):
                self._note((weights, lora))

    @staticmethod
    def _lora(layers: list[str], dice: torch.Generator) -> dict[str, torch.Tensor]:
        sizes = {name: part for name, part in net().named_modules() if name in layers}
        return {
            f"{name}.lora_{side}.weight": torch.randn(shape, generator=dice) / 8
            for name, part in sizes.items()
            for side, shape in (("A", (4, part.in_features)), ("B", (part.out_features, 4)))
        }

    def _note(self, state: State) -> None:
        module = self.load(FIRST, f"{self.device},*", "merge")
        if state[0] == "second":
            self.write(module)
        distorch.set_loras(module, self.lora(state))
        with torch.no_grad():
            self.outputs[state] = module(self.x.to(self.device)).cpu()
        self.gradients[state] = self.gradient(module)

    def lora(self, state: State) -> list[tuple[dict[str, torch.Tensor], float]]:
        return [(self.loras[state[1]], 0.5)] if state[1] else []

    def load(
        self, state: State, spec: str, mode: str, module: nn.Module | None = None
    ) -> nn.Module:
        return distorch.load(
            net(self.dtype) if module is None else module, self.file, spec,
            loras=self.lora(state), lora_mode=mode, min_bytes=0, prefetch="64kb",
            compute=self.device, progress=False, verify=state == FIRST,
        )  # fmt: skip

    def write(self, module: nn.Module) -> None:
        """Other weights, of the same dtypes, by the means of PyTorch."""
        own = module.state_dict()
        module.load_state_dict({k: v.to(own[k].dtype) for k, v in self.second.items()})

    def gradient(self, module: nn.Module) -> torch.Tensor:
        x = self.x.to(self.device).requires_grad_()
        return torch.autograd.grad(module(x).float().square().sum(), [x])[0].cpu()


@dataclass
class Model:
    """A module that threads share, and the states that it may have been in."""

    module: nn.Module
    possible: list[set[State]]  # the last entry: now. One more whenever that changes
    lock: threading.Condition = field(default_factory=threading.Condition)
    running: Counter = field(default_factory=Counter)
    changes: list[State] = field(default_factory=list)  # of values, under way or just before those
    under_way: int = 0

    @contextlib.contextmanager
    def beside_others(self, operation: str) -> Iterator[None]:
        """Waits until nothing runs that may not run beside this operation."""

        def is_free() -> bool:
            apart = {b if a == operation else a for a, b in APART if operation in (a, b)}
            return not any(self.running[other] for other in apart)

        with self.lock:
            self.lock.wait_for(is_free)
            self.running[operation] += 1
        try:
            yield
        finally:
            with self.lock:
                self.running[operation] -= 1
                self.lock.notify_all()

    @contextlib.contextmanager
    def becoming(self, state: State) -> Iterator[None]:
        """Of changes that overlap any may be the last one. Afterwards it is one of these states."""
        with self.lock:
            if not self.under_way:
                self.changes = []
            self.under_way += 1
            self.changes.append(state)
            self.possible.append(self.possible[-1] | {state})
        yield
        with self.lock:
            self.under_way -= 1
            if not self.under_way:
                self.possible.append(set(self.changes))

    def state(self) -> State:
        """One of those that it may be in now."""
        return min(self.possible[-1])

    def states_since(self, moment: int) -> set[State]:
        return set().union(*self.possible[moment:])

    def moment(self) -> int:
        return len(self.possible) - 1


class Program:
    """Some models on one device, and threads that use them."""

    OPERATIONS = {
        "forward": 8, "backward": 2, "redistribute": 3, "set_loras": 4, "finish_merging": 1,
        "copy": 1, "save": 1, "fork": 1, "trace": 1, "look": 2, "whole": 1, "write": 1,
        "reload": 1, "load": 2, "wrong": 1,
    }  # fmt: skip

    def __init__(self, setting: Setting, seed: int, steps: int, operations: Sequence[str]) -> None:
        self.setting, self.seed, self.steps = setting, seed, steps
        self.operations = operations
        dice = random.Random(seed)
        self.models = [self._new(dice) for _ in range(dice.choice([1, 1, 2, 4]))]
        self.count = dice.randint(2, 8)
        self.failures: list[str] = []
        self.log: deque[str] = deque(maxlen=60)
        self.done: Counter = Counter()

    def run(self) -> Counter:
        """How often each operation was done. AssertionError if a promise was broken."""
        threads = [
            threading.Thread(target=self._work, args=(i,), name=f"user-{i}")
            for i in range(self.count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        dice = random.Random(self.seed)
        for model in self.models:
            if not self.failures:
                self.finish_merging(model, dice)
                self.forward(model, dice)
                self.save(model, dice)
        before = "before:\n  " + "\n  ".join(self.log)
        assert not self.failures, f"seed {self.seed}: {self.failures[0]}\n{before}"
        self.models.clear()
        del model
        try:
            self._check_nothing_left()
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}: {error}\n{before}") from None
        return self.done

    def _work(self, number: int) -> None:
        dice = random.Random(self.seed * 1000 + number)
        weights = [self.OPERATIONS[name] for name in self.operations]
        own = None
        if self.setting.device != "cpu" and dice.random() < 0.5:
            own = torch.Stream(device=self.setting.device)
        for _ in range(self.steps):
            name = dice.choices(self.operations, weights)[0]
            model = dice.choice(self.models)
            here = own if own is not None and name in ON_STREAMS else contextlib.nullcontext()
            try:
                with model.beside_others(name), here:
                    self._note(number, model, f"{name} begins")
                    getattr(self, name)(model, dice)
                    self._note(number, model, f"{name} ends")
            except BaseException:
                self._note(number, model, f"{name} fails")
                self.failures.append(f"{name}: {traceback.format_exc()}")
            self.done[name] += 1
            if self.failures:
                return

    def _note(self, thread: int, model: Model, what: str) -> None:
        self.log.append(f"{id(model.module) % 10_000:4d} thread {thread}: {what}")

    def _new(self, dice: random.Random) -> Model:
        state = ("first", dice.choice(["", "a", "b"]))
        spec = dice.choice(SPECS[self.setting.device])
        module = self.setting.load(state, spec, dice.choice(MODES))
        return Model(module, [{state}])

    def _check(self, got: torch.Tensor, wanted: dict[State, torch.Tensor], of: set[State]) -> None:
        found = [state for state, value in wanted.items() if torch.equal(got, value)]
        assert set(found) & of, f"expected the output of one of {of}, got that of {found}"

    # --- operations ---

    def forward(self, model: Model, dice: random.Random) -> None:
        self._forward(model, dice.choice([torch.no_grad, torch.inference_mode]))

    def _forward(
        self, model: Model, mode: type[torch.no_grad] | type[torch.inference_mode]
    ) -> None:
        moment = model.moment()
        with mode():
            got = model.module(self.setting.x.to(self.setting.device)).cpu()
        self._check(got, self.setting.outputs, model.states_since(moment))

    def backward(self, model: Model, _: random.Random) -> None:
        moment = model.moment()
        got = self.setting.gradient(model.module)
        self._check(got, self.setting.gradients, model.states_since(moment))

    def redistribute(self, model: Model, dice: random.Random) -> None:
        spec = dice.choice(SPECS[self.setting.device])
        distorch.redistribute(model.module, spec, progress=False)

    def set_loras(self, model: Model, dice: random.Random) -> None:
        state = (model.state()[0], dice.choice(["", "a", "b"]))
        with model.becoming(state):
            loras, mode = self.setting.lora(state), dice.choice([*MODES, None])
            self.log.append(f"  {state[1] or 'none'} {mode}")
            distorch.set_loras(model.module, loras, lora_mode=mode)

    def finish_merging(self, model: Model, _: random.Random) -> None:
        with contextlib.suppress(distorch.PlacementError):  # it is whole at the moment
            distorch.finish_merging(model.module)

    def copy(self, model: Model, dice: random.Random) -> None:
        copied = copy.deepcopy(model.module)
        same = Model(copied, [model.possible[-1]])
        self.forward(same, dice)
        self.redistribute(same, dice)
        self.forward(same, dice)

    def save(self, model: Model, _: random.Random) -> None:
        moment, file = model.moment(), io.BytesIO()
        torch.save(model.module.state_dict(), file)
        saved = net(self.setting.dtype)
        file.seek(0)
        saved.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        saved.to(self.setting.device)
        with torch.no_grad():
            got = saved(self.setting.x.to(self.setting.device)).cpu()
        self._check(got, self.setting.outputs, model.states_since(moment))

    def fork(self, model: Model, _: random.Random) -> None:
        """A child uses the model, as a worker of a DataLoader may. CUDA does not survive forks.

        In inference mode: else PyTorch takes a mutex of the weight, which another thread may have
        held at the fork. Children of plain PyTorch stand still there, too (docs/modules.md).
        """
        if self.setting.device != "cpu":
            return
        sys.stdout.flush()
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                self._forward(model, torch.inference_mode)
                status = 0
            os._exit(status)
        status = watchdog.status_of_child(child, FORK_SECONDS)
        assert status == 0, "the forked child computed something else"

    def trace(self, model: Model, dice: random.Random) -> None:
        try:
            with distorch.trace(model.module) as timeline:
                self.forward(model, dice)
            assert str(timeline)
        except distorch.PlacementError as error:
            assert "trace is running already" in str(error)

    def look(self, model: Model, _: random.Random) -> None:
        """As a user interface does, at any time."""
        with contextlib.suppress(distorch.PlacementError):  # it is whole at the moment
            assert str(distorch.report(model.module))
            assert distorch.stats(model.module)

    def whole(self, model: Model, dice: random.Random) -> None:
        """A plain module for a moment, without LoRAs: they could not be taken off any more."""
        state = (model.state()[0], "")
        with model.becoming(state):
            distorch.set_loras(model.module, [])
        distorch.undistribute(model.module)
        self.forward(model, dice)
        spec = dice.choice(SPECS[self.setting.device])
        distorch.distribute(
            model.module, spec, min_bytes=0, prefetch="64kb", compute=self.setting.device,
            progress=False,
        )  # fmt: skip
        if self.setting.kind == "float8":  # its weights are wide ones now
            self.setting.load(state, spec, dice.choice(MODES), model.module)

    def write(self, model: Model, dice: random.Random) -> None:
        """Other weights, by the means of PyTorch, which has no blocks of float8 to write."""
        if self.setting.kind == "float8":
            return
        distorch.set_loras(model.module, [])
        self.setting.write(model.module)
        model.possible.append({("second", "")})
        self.forward(model, dice)

    def reload(self, model: Model, dice: random.Random) -> None:
        """The weights of the file again, over those that are there."""
        state: State = ("first", dice.choice(["", "a", "b"]))
        with model.becoming(state):
            spec = dice.choice(SPECS[self.setting.device])
            self.setting.load(state, spec, dice.choice(MODES), model.module)

    def load(self, model: Model, dice: random.Random) -> None:
        """A new model in its place. The old one is let go of, while others may still use it."""
        fresh = self._new(dice)
        with contextlib.suppress(ValueError):
            self.models[self.models.index(model)] = fresh

    def wrong(self, model: Model, _: random.Random) -> None:
        """A forward pass that ends in an error of PyTorch."""
        x = torch.zeros(2, WIDTH + 1, dtype=self.setting.dtype, device=self.setting.device)
        with contextlib.suppress(RuntimeError), torch.no_grad():
            model.module(x)
            raise AssertionError("an input of the wrong size was taken")

    def _check_nothing_left(self) -> None:
        for _ in range(100):  # threads that merge end by themselves
            gc.collect()
            merging = [t.name for t in threading.enumerate() if t.name == "distorch-merge"]
            if not merging:
                break
            time.sleep(0.05)
        assert not merging, "a thread still merges LoRAs into models that are gone"
        if self.setting.device != "cpu":
            from distorch.testing import sim

            sim.synchronize()
            races = sim.races()
            assert not races, f"two streams were not ordered: {races[0]}"
            assert sim.pinned_bytes() == 0
            held = [torch.sim.memory_allocated(f"sim:{i}") for i in range(2)]
            assert held == [0, 0], f"bytes that are left on the devices: {held}"


def run(
    programs: int,
    seed: int = 0,
    steps: int = 12,
    only: str = "",
    operations: Sequence[str] = tuple(Program.OPERATIONS),
) -> Counter:
    """Runs programs in this process. AssertionError at the first broken promise."""
    torch.set_num_threads(1)
    settings: dict[tuple[str, str], Setting] = {}
    done: Counter = Counter()
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name, "cache"))
        for number in range(seed, seed + programs):
            dice = random.Random(number)
            device = dice.choice(["cpu", "sim:0"])
            device = only or device
            key = (device, dice.choice(KINDS))
            if device != "cpu":
                configure(dice)
            if key not in settings:
                settings[key] = Setting(*key, Path(name))
            program = Program(settings[key], number, steps, operations)
            print(f"{number}: {key[1]} on {device}, {program.count} threads", flush=True)
            done += program.run()
    return done


def configure(dice: random.Random) -> None:
    """A simulated machine with links of any speed."""
    from distorch.testing import sim

    links = {("cpu", "sim:0"): (dice.choice([1e8, 1e9, 50e9]), 1e-5)}
    if dice.random() < 0.5:
        links["sim:1", "sim:0"] = (dice.choice([1e8, 50e9]), 1e-6)
    mode = dice.choice(["deferred", "deferred", "eager"])
    sim.configure(devices=2, memory="1gb", flops=dice.choice([1e9, 1e12]), links=links, mode=mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="?", type=int, default=1000, help="default 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--steps", type=int, default=12, help="of each thread (default 12)")
    parser.add_argument("--device", default="", help="cpu or sim:0; if not given, either")
    parser.add_argument(
        "--operations", type=lambda text: text.split(","), default=list(Program.OPERATIONS),
        metavar="A,B", help=f"some of {', '.join(Program.OPERATIONS)}",
    )  # fmt: skip
    parser.add_argument("--here", action="store_true", help="in this process, without a watchdog")
    given = parser.parse_args()
    if given.here:
        done = run(given.programs, given.seed, given.steps, given.device, given.operations)
        print(f"{given.programs} programs, {done.total()} operations: {dict(done)}")
        print("every output was right, and no stream met another without an event between them")
        return
    text = watchdog.run(
        ["-m", "tests.reliability.threads", "--here", *sys.argv[1:]],
        env={"OMP_NUM_THREADS": "1", "DISTORCH_CHECK_LOCKS": "1"}, told=lambda text: print(text, end="", flush=True),
    )  # fmt: skip
    assert re.search(r"\d+ programs", text), "it ended too early"


if __name__ == "__main__":
    main()
