# SPDX-License-Identifier: Apache-2.0
"""How processes end that have used a ring, and what a forked child may do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import torch

import distorch

_START = """
import sys, threading, time, torch
kind = sys.argv[1]
if kind == "sim":
    from distorch.testing import sim
import distorch
model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
distorch.distribute(model, kind + ":0,0b;cpu,*", min_bytes=0)
x = torch.randn(4, 512).to(kind + ":0")
def forward():
    with torch.no_grad():
        return model(x)
forward(); forward()
"""
_IN_A_THREAD = """
def work():
    while True:
        forward()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
# How a program ends -> (its last lines, the exit status that is right).
ENDINGS = {
    "normal": ("", 0),
    "sys.exit(3)": ("sys.exit(3)", 3),
    "exception": ("raise ValueError('as asked')", 1),
}
# PyTorch itself may abort when Python ends under a daemon thread. So may we, but not hang or crash.
PLAIN, OURS = "daemon thread, resident model", "daemon thread, distributed model"
_LIMIT_S = 26.0  # for all of them


def _programs() -> dict[str, str]:
    found = {name: _START + last for name, (last, _) in ENDINGS.items()}
    resident = _START.replace("distorch.distribute(", "(lambda *_, **__: model.to(kind))(")
    return {**found, PLAIN: resident + _IN_A_THREAD, OURS: _START + _IN_A_THREAD}


def endings(device: torch.device) -> dict[str, Any]:
    """Exit statuses: a library that is torn down in the wrong order crashes here."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", program, device.type],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads that spin would starve the others
        )
        for name, program in _programs().items()
    }  # fmt: skip
    until = time.monotonic() + _LIMIT_S
    found = {name: _ended(process, until) for name, process in running.items()}
    statuses = {name: status for name, (status, _) in found.items()}
    right: dict[str, set[int | str]] = {name: {status} for name, (_, status) in ENDINGS.items()}
    right |= {PLAIN: {statuses[PLAIN]}, OURS: {0, -signal.SIGABRT, statuses[PLAIN]}}
    wrong = [
        f"{name}: {status}, not exit status {sorted(right[name], key=str)} {told[-300:]}".strip()
        for name, (status, told) in found.items()
        if status not in right[name]
    ]
    return {"exit statuses": statuses, "wrong": wrong}


def _ended(process: subprocess.Popen[str], until: float) -> tuple[int | str, str]:
    try:
        _, said = process.communicate(timeout=max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return "still running", ""
    return process.returncode, said


def _model(device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    distorch.distribute(model, f"{device},0b;cpu,*", min_bytes=0)
    x = torch.randn(4, 256).to(device)
    with torch.no_grad():
        model(x)
        model(x)
    return model, x


def fork(device: torch.device) -> dict[str, Any]:
    """A child that is forked after a fetch and uses the CPU alone, as data loaders do."""
    model, x = _model(device)
    child = os.fork()
    if child == 0:
        total = torch.ones(100, 100).sum().item()
        os._exit(0 if total == 10000 else 4)
    status = _waited(child)
    with torch.no_grad():
        model(x)  # the parent goes on
    wrong = [] if status == 0 else [f"the forked child ended with {status}, not 0"]
    return {"exit status of the child": status, "wrong": wrong}


def _waited(child: int) -> int | str:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "still running"
