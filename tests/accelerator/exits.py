# SPDX-License-Identifier: Apache-2.0
"""Processes end with the right exit code, whatever a model is doing then."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = """
import atexit, os, sys, threading, time
import torch
from torch import nn
import distorch

torch.manual_seed(0)
device, dtype, width = torch.device({device!r}), {dtype}, {width}
model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(6)))
distorch.distribute(model, f"{{device}},0b;cpu,50%;disk,50%", min_bytes=0, prefetch=3 * model[0].weight.nbytes)
x = torch.randn(4, width).to(device, dtype)

def forward():
    with torch.no_grad():
        return model(x)

for _ in range(2):
    y = forward()
"""
# What the program does at its end, and the exit code.
ENDS = {
    "alive": ("", 0),
    "sys.exit": ("with torch.no_grad():\n    y = model(x)\n    sys.exit(3)", 3),
    "an error": ("with torch.no_grad():\n    y = model(x)\n    raise ValueError('mine')", 1),
    # A daemon that is inside an operator when Python ends is the end of any PyTorch program; this
    # one has been.
    "a cycle, a daemon, at exit": (
        "model.itself = [model]\n"
        "started = threading.Event()\n"
        "def wait():\n    y = forward()\n    started.set()\n    time.sleep(100)\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
        "started.wait()\n"
        "atexit.register(lambda: print(forward().sum().item()))",
        0,
    ),
    # Python must not end while PyTorch's threads for backward let go of what they had: in a
    # resident model's program, too, they ask for the interpreter then, and that aborts.
    "training": (
        "model(x).sum().backward()\ntime.sleep(0.5)\ny = forward()",
        0,
    ),
    "background": (
        "up, down = torch.randn(width, 4), torch.randn(4, width)\n"
        "lora = {f'{i}.lora_A.weight': down for i in range(6)}\n"
        "lora |= {f'{i}.lora_B.weight': up for i in range(6)}\n"
        "distorch.set_loras(model, [(lora, 1.0)], lora_mode='background')\n"
        "y = forward()",
        0,
    ),
    "a thread in a forward": (
        "def many():\n    time.sleep(0.2)\n    for _ in range(20):\n        forward()\n"
        "threading.Thread(target=many).start()",
        0,
    ),
}


def run_program(machine, end, **environment):
    """The finished process of a program that has just issued a forward."""
    facts = {
        "device": str(machine.device),
        "dtype": machine.dtype,
        "width": min(machine.width, 1024),
    }
    text = machine.setup + BEGIN.format(**facts) + textwrap.dedent(end) + "\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, timeout=100, capture_output=True, text=True,
        check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_the_exit_code(machine, end):
    code, wanted = ENDS[end]
    done = run_program(machine, code)
    assert done.returncode == wanted, done.stderr[-4000:]
    told = done.stderr.splitlines()
    if end == "an error":
        assert told[-1] == "ValueError: mine"
    else:
        assert not told, done.stderr[-4000:]
