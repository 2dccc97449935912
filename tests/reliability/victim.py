# SPDX-License-Identifier: Apache-2.0
"""What users do, again and again, in a process that somebody kills or interrupts.

`Victim` has a model in a file, its outputs with and without a LoRA, and the operations: each ends
with the model as it is afterwards, or, after an error, as it was before.
"""

import json
import random
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import distorch
from distorch._small_files import spare_name, write_atomically

WIDTH, LAYERS = 256, 6
SPECS = ("disk,*", "cpu,50%;disk,*", "cpu,0b;disk,*", "cpu,*")
MODES = ("merge", "fetch", "background")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    return nn.Sequential(*layers).eval()


class Victim:
    """A folder with the model's file, and what its outputs are in every state."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.file = folder / "model.safetensors"
        if not self.file.is_file():
            save_file(net().state_dict(), self.file)
        torch.manual_seed(1)
        self.x = torch.randn(2, WIDTH)
        self.lora = {
            f"{i}.lora_{side}.weight": torch.randn(*shape) / 8
            for i in range(LAYERS)
            for side, shape in (("A", (4, WIDTH)), ("B", (WIDTH, 4)))
        }
        self.dice = random.Random(seed)
        self.module = self._loaded([])
        self.loras: list = []
        self.wanted = {"": net()(self.x)}
        self.wanted["lora"] = self._loaded([(self.lora, 1.0)])(self.x)

    def _loaded(
        self, loras: list, spec: str = "cpu,0b;disk,*", *, verify: bool = False
    ) -> nn.Module:
        return distorch.load(
            net(), self.file, spec, loras=loras, min_bytes=0, progress=False, prefetch="1mb",
            verify=verify,
        )  # fmt: skip

    def check(self) -> None:
        """The model is in the state that it should be in, to the bit."""
        distorch.finish_merging(self.module)
        state = "lora" if self.loras else ""
        assert torch.equal(self.module(self.x), self.wanted[state]), f"wrong numbers ({state})"

    # --- operations ---

    def load(self) -> None:
        """Anew from the file. The old model goes when the new one is there."""
        loras, verify = self.dice.choice([[], [(self.lora, 1.0)]]), self.dice.choice([False, True])
        self.module = self._loaded(loras, self.dice.choice(SPECS), verify=verify)
        self.loras = loras

    def redistribute(self) -> None:
        distorch.redistribute(self.module, self.dice.choice(SPECS), progress=False)

    def set_loras(self) -> None:
        loras = [] if self.loras else [(self.lora, 1.0)]
        distorch.set_loras(self.module, loras, lora_mode=self.dice.choice(MODES))
        self.loras = loras

    def step(self) -> None:
        self.module(self.x)

    def save(self) -> None:
        """A plan, a trace, a picture and the weights."""
        plan = distorch.plan(self.module, "cpu,50%;disk,*", min_bytes=0)
        plan.save(self.folder / "plan.json")
        plan.plot(self.folder / "plan.svg")
        with distorch.trace(self.module, self.folder / "trace.json"):
            self.module(self.x)

    OPERATIONS = ("load", "redistribute", "set_loras", "step", "save")

    def one(self) -> str:
        """Runs one operation at random; returns its name."""
        name = self.dice.choice(self.OPERATIONS)
        getattr(self, name)()
        return name


def _check_trace(file: Path) -> None:
    assert "traceEvents" in json.loads(file.read_text())


def _check_picture(file: Path) -> None:
    assert file.read_text().rstrip().endswith("</svg>")


# What the victim saves, and what tells whether it is whole.
SAVED = {"plan.json": distorch.Plan.load, "trace.json": _check_trace, "plan.svg": _check_picture}


def check_folder(folder: Path, scratch: Path) -> None:
    """Nothing half written is there, and nothing that nobody needs."""
    left = [path.name for path in scratch.iterdir()]
    assert left == [], f"scratch is left: {left}"
    assert len(load_file(folder / "model.safetensors")) == 2 * LAYERS
    for name, check in SAVED.items():
        file = folder / name
        spare = spare_name(file)
        if file.is_file():
            check(file)
        if spare.is_file():  # killed in the moment in which the new file has this name
            check(spare)
            assert file.is_file(), f"{spare.name} is left, and there was nothing to replace"
            write_atomically(file, file.read_bytes())
    known = {"model.safetensors", *SAVED}
    others = [path.name for path in folder.iterdir() if path.name not in known]
    assert others == [], f"files are left: {others}"


def check_nothing_left() -> None:
    """No thread of ours is there, and no more open files than there were."""
    own = [t.name for t in threading.enumerate() if t.name.startswith("distorch-")]
    assert own == [], f"threads are left: {own}"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> None:
    """python -m tests.reliability.victim FOLDER SEED: until somebody kills it."""
    victim = Victim(Path(sys.argv[1]), int(sys.argv[2]))
    victim.check()
    print("ready", flush=True)
    while True:
        victim.one()
        victim.check()


if __name__ == "__main__":
    main()
