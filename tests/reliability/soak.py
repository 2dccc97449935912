# SPDX-License-Identifier: Apache-2.0
"""python -m tests.reliability.soak [--hours 6]: what users do, again and again, in one process.

A round has every chapter once, in an order and with numbers that the seed gives. Each chapter checks
its outputs by bits, and lets go of what it made. After every round, what the process holds is
measured. In the last quarter of the rounds it must hold no more than in the second.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import io
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import FetchError, FormatError, PlacementError, SpecError
from distorch.testing import sim
from tests.gguf_files import Q, write_gguf
from tests.reliability import threads, watchdog
from tests.training.loops import assert_same_training, train
from tests.training.models import language

WIDTH, LAYERS = 128, 6
MODES = ("merge", "fetch", "background")
SPECS = (
    ("cpu", "cpu,*"), ("cpu", "cpu,0b;disk,*"), ("cpu", "cpu,40%;disk,*"), ("cpu", "disk,*"),
    ("sim:0", "sim:0,0b;cpu,*"), ("sim:0", "sim:0,30%;cpu,30%;disk,*"),
    ("sim:0", "sim:0,0b;sim:1,40%;cpu,*"), ("sim:0", "sim:0,0b;cpu+sim:1,*"), ("sim:0", "sim:0,*"),
)  # fmt: skip

LEAST_ROUNDS = 4  # so that there is something to compare
COMPILE_SECONDS = 120  # a child takes one or two

# How much more of a kind there may be at the end than in the second quarter. Memory that nobody
# uses any more stays in the holes of malloc's heap, a little more or less of it.
MAY_GROW = {"memory": 24 << 20}


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*layers).eval()


@dataclass(frozen=True)
class Held:
    """What the process holds while it does nothing."""

    memory: int  # bytes that are no file's
    threads: int
    files: int  # open ones, scratch files included
    pinned: int  # bytes
    on_devices: int  # bytes

    @classmethod
    def now(cls) -> Held:
        for _ in range(100):  # threads that merge end by themselves
            gc.collect()
            if not any(t.name == "distorch-merge" for t in threading.enumerate()):
                break
            time.sleep(0.05)
        sim.synchronize()
        ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/status").read_text()
        number = {name: int(found) for name, found in re.findall(r"(\w+):\s+(\d+)", status)}
        return cls(
            memory=(number["RssAnon"] + number["RssShmem"]) << 10,
            threads=number["Threads"],
            files=len(list(Path("/proc/self/fd").iterdir())),
            pinned=sim.pinned_bytes(),
            on_devices=sum(torch.sim.memory_allocated(f"sim:{i}") for i in range(2)),
        )

    def __str__(self) -> str:
        return (
            f"{self.memory / 2**20:.1f} MB, {self.threads} threads, {self.files} files, "
            f"{self.pinned} bytes pinned, {self.on_devices} on devices"
        )


def grown(held: Sequence[Held]) -> str:
    """What there is more of in the last quarter of the rounds than in the second; "": nothing.
    REQUIRES: four rounds.
    """
    quarter = len(held) // 4
    early, late = held[quarter : 2 * quarter], held[-quarter:]
    found = []
    for name in asdict(held[0]):
        before = statistics.median(getattr(h, name) for h in early)
        after = statistics.median(getattr(h, name) for h in late)
        if after > before + MAY_GROW.get(name, 0):
            found.append(f"{name}: {before:,.0f} in the second quarter, {after:,.0f} in the last")
    return "; ".join(found)


class Soak:
    """A folder with files, and the chapters."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder, self.dice = folder, dice
        self.file = folder / "model.safetensors"
        save_file(net().state_dict(), self.file)
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(3, WIDTH, generator=draw)
        self.loras = [
            {
                f"{2 * i}.lora_{side}.weight": torch.randn(shape, generator=draw) / 8
                for i in layers
                for side, shape in (("A", (4, WIDTH)), ("B", (WIDTH, 4)))
            }
            for layers in (range(LAYERS), range(0, LAYERS, 2))
        ]
        for number, lora in enumerate(self.loras):
            save_file(lora, folder / f"lora{number}.safetensors")
        self.wanted = net()(self.x).detach()
        torch.compile(nn.Identity(), backend="aot_eager")(self.x)  # imports what children need

    # --- what chapters share ---

    def spec(self, device: str | None = None) -> tuple[str, str]:
        """A device, and a placement for it."""
        return self.dice.choice([pair for pair in SPECS if device in (None, pair[0])])

    def load(self, device: str, spec: str, **options: object) -> nn.Module:
        options = {"min_bytes": 0, "prefetch": "128kb", "progress": False, **options}
        return distorch.load(net(), self.file, spec, compute=device, **options)

    def out(self, module: nn.Module, device: str) -> torch.Tensor:
        with torch.no_grad():
            return module(self.x.to(device, next(module.parameters()).dtype)).cpu()

    def check(self, module: nn.Module, device: str, wanted: torch.Tensor | None = None) -> None:
        wanted = self.wanted if wanted is None else wanted
        assert torch.equal(self.out(module, device), wanted), "wrong numbers"

    def patched(self, loras: Sequence[tuple[object, float]]) -> torch.Tensor:
        """The output with these LoRAs."""
        return self.out(self.load("cpu", "cpu,*", loras=loras), "cpu")

    # --- chapters ---

    def threads_and_forks(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            threads.run(2, self.dice.randrange(10**6), steps=6)

    def budgets(self) -> None:
        """One model; the room on the device changes, as it does beside others."""
        device, spec = self.spec("sim:0")
        module = self.load(device, spec)
        for _ in range(8):
            share = self.dice.randrange(0, 101, 5)
            rest = (
                self.dice.choice(["cpu,*", "disk,*", "sim:1,20%;cpu,*"]) if share < 80 else "cpu,*"
            )
            distorch.redistribute(module, f"sim:0,{share}%;{rest}", progress=False)
            for _ in range(3):
                self.check(module, device)

    def loras_in_every_mode(self) -> None:
        device, spec = self.spec()
        module = self.load(device, spec)
        for _ in range(6):
            chosen = self.dice.sample([0, 1], self.dice.randint(0, 2))
            loras = [
                (self.folder / f"lora{i}.safetensors", self.dice.choice([0.5, 1])) for i in chosen
            ]
            distorch.set_loras(module, loras, lora_mode=self.dice.choice(MODES))
            self.check(module, device, self.patched(loras))
            if self.dice.random() < 0.5:
                distorch.redistribute(module, self.spec(device)[1], progress=False)
            distorch.finish_merging(module)
            self.check(module, device, self.patched(loras))

    def files_of_every_kind(self) -> None:
        state = net().state_dict()
        torch.save(state, self.folder / "model.pt")
        half = {k: v.half() for k, v in state.items()}
        save_file(half, self.folder / "half.safetensors")
        narrow = {k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in state.items()}
        narrow |= {f"{k}_scale": torch.tensor(0.5) for k, v in state.items() if v.dim() == 2}
        save_file(narrow, self.folder / "narrow.safetensors")
        kind = self.dice.choice([Q.Q8_0, Q.Q4_0, Q.Q5_1])
        write_gguf(self.folder / "model.gguf", "llama", state, kind)
        for name in ("model.pt", "half.safetensors", "narrow.safetensors", "model.gguf"):
            device, spec = self.spec()
            options = {"min_bytes": 0, "progress": False}
            one = distorch.load(net(), self.folder / name, "cpu,*", **options)
            other = distorch.load(net(), self.folder / name, spec, compute=device, **options)
            wanted = self.out(one, "cpu")
            for _ in range(3):
                self.check(other, device, wanted)
            if name == "model.pt":
                self.check(other, device)

    def training(self) -> None:
        wanted = train(language(), steps=4)
        module = language()
        distorch.distribute(module, self.spec("cpu")[1], min_bytes=0, progress=False)
        assert_same_training(train(module, steps=4), wanted)

    def compiled(self) -> None:
        """In a forked child, since every call of torch.compile leaves memory: PyTorch alone 160 KB."""
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                self._compiled()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = watchdog.status_of_child(child, COMPILE_SECONDS)
        assert status == 0, "the compiled model computed something else, or failed (see above)"

    def _compiled(self) -> None:
        module = self.load(*self.spec("cpu"))
        fast = torch.compile(module, backend="aot_eager")
        self.check(fast, "cpu")
        distorch.redistribute(module, self.spec("cpu")[1], progress=False)
        self.check(fast, "cpu")

    def saving_and_copying(self) -> None:
        device, spec = self.spec()
        module = self.load(device, spec)
        torch.save(module.state_dict(), self.folder / "saved.pt")
        fresh = net()
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        fresh.load_state_dict(torch.load(self.folder / "saved.pt", map_location="cpu"))
        self.check(fresh, "cpu")
        copied = copy.deepcopy(module)
        module.load_state_dict({k: torch.zeros_like(v) for k, v in net().state_dict().items()})
        self.check(copied, device)
        assert not self.out(module, device).any()
        distorch.undistribute(copied)
        self.check(copied, device)

    def pictures_and_tables(self) -> None:
        device, spec = self.spec()
        module = self.load(device, spec)
        plan = distorch.plan(module, spec, compute=device, min_bytes=0)
        plan.save(self.folder / "plan.json")
        assert str(distorch.Plan.load(self.folder / "plan.json")) and plan.plot().svg()
        with distorch.trace(module, self.folder / "trace.json") as timeline:
            self.check(module, device)
        report = distorch.report(module)
        assert str(report) and report.plot().svg() and str(timeline) and timeline.plot().svg()
        assert str(distorch.stats(module)) and report._repr_html_()

    def errors(self) -> None:
        """Each is told by name, and the model goes on."""
        device, spec = self.spec("sim:0")
        module = self.load(device, spec)
        cut = self.folder / "cut.safetensors"
        cut.write_bytes(self.file.read_bytes()[: self.dice.randrange(1, 10_000)])
        wrong = {"0.lora_A.weight": torch.zeros(4, 7), "0.lora_B.weight": torch.zeros(7, 4)}
        told: list[tuple[type[Exception] | tuple[type[Exception], ...], Callable[[], object]]] = [
            (FormatError, lambda: distorch.load(module, cut, spec, min_bytes=0, compute=device)),
            ((OSError, FormatError), lambda: distorch.load(net(), self.folder / "none.gguf", spec)),
            (SpecError, lambda: distorch.redistribute(module, "sim:0,lots")),
            (PlacementError, lambda: distorch.redistribute(module, "sim:7,*")),
            ((FormatError, PlacementError), lambda: distorch.set_loras(module, [(wrong, 1.0)])),
            (RuntimeError, lambda: module(torch.zeros(1, WIDTH + 1, device=device))),
        ]
        for kind, action in told:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    action()
                except kind:
                    pass
                else:
                    raise AssertionError(f"there should have been {kind}")
            self.check(module, device)
        for what in ("copy", "alloc"):  # where it hits looking ahead, nobody is told
            sim.fail(what, nth=self.dice.randint(1, 4))
            with contextlib.suppress(FetchError, PlacementError, RuntimeError):
                distorch.redistribute(module, self.spec(device)[1], progress=False)
                self.out(module, device)
            sim.reset()
            self.check(module, device)

    CHAPTERS = (
        threads_and_forks, budgets, loras_in_every_mode, files_of_every_kind, training, compiled,
        saving_and_copying, pictures_and_tables, errors,
    )  # fmt: skip

    def round(self, chapters: Sequence[str]) -> None:
        """Every chapter once. AssertionError if a promise was broken."""
        links = {("cpu", "sim:0"): (self.dice.choice([1e9, 50e9]), 1e-5)}
        for chapter in self.dice.sample(self.CHAPTERS, len(self.CHAPTERS)):
            if chapter.__name__ not in chapters:
                continue
            mode = self.dice.choice(["deferred", "eager"])
            sim.configure(devices=2, memory="1gb", links=links, mode=mode)
            try:
                chapter(self)
                sim.synchronize()
                assert sim.races() == [], sim.races()[0]
            except Exception as error:
                raise AssertionError(f"{chapter.__name__}: {error}") from error


CHAPTERS = tuple(chapter.__name__ for chapter in Soak.CHAPTERS)


def run(
    *,
    seconds: float = 0.0,
    seed: int = 0,
    chapters: Sequence[str] = CHAPTERS,
    told: Callable[[str], None] = lambda text: None,
) -> list[Held]:
    """What was held after each round: four, and more until the time is over.

    Raises:
        AssertionError: A promise was broken, or the process holds more and more.
    """
    if unknown := sorted(set(chapters) - set(CHAPTERS)):
        raise ValueError(f"chapters {unknown}: expected some of {', '.join(CHAPTERS)}")
    torch.set_num_threads(1)
    began, held = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        soak = Soak(Path(name), random.Random(seed))
        while len(held) < LEAST_ROUNDS or time.monotonic() - began < seconds:
            try:
                soak.round(chapters)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, round {len(held) + 1}: {error}") from error
            held.append(Held.now())
            told(f"{(time.monotonic() - began) / 60:.1f} min, round {len(held)}: {held[-1]}")
            for kind in ("pinned", "on_devices"):
                left = getattr(held[-1], kind)
                assert left == 0, f"round {len(held)} of seed {seed} left {left} bytes: {kind}"
    more = grown(held)
    assert not more, f"the process holds more and more. {more}"
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=6, help="default 6")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="else from the clock")
    parser.add_argument(
        "--chapters", type=lambda text: text.split(","), default=list(CHAPTERS), metavar="A,B",
        help=f"some of {', '.join(CHAPTERS)}",
    )  # fmt: skip
    parser.add_argument("--here", action="store_true", help="in this process, without a watchdog")
    given = parser.parse_args()
    if given.here:
        print(f"seed {given.seed}", flush=True)
        held = run(
            seconds=given.hours * 3600, seed=given.seed, chapters=given.chapters,
            told=lambda text: print(text, flush=True),
        )  # fmt: skip
        print(f"{len(held)} rounds: every output was right, and nothing grew")
        return
    text = watchdog.run(
        ["-m", "tests.reliability.soak", "--here", *sys.argv[1:]],
        env={"OMP_NUM_THREADS": "1"}, told=lambda text: print(text, end="", flush=True),
    )  # fmt: skip
    assert re.search(r"\d+ rounds", text), "it ended too early"


if __name__ == "__main__":
    main()
