# SPDX-License-Identifier: Apache-2.0
"""Runs one probe: python -m tests.gpu.report.probes NAME --device cuda|sim."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import distorch  # noqa: F401 - before anything is measured

from . import TIMED, captures, contexts, events, host_memory, lives

PROBES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "events": events.costs,
    "freeing": host_memory.freeing,
    "pinning": host_memory.pinning,
    "addresses": host_memory.addresses,
    "direct-reads": host_memory.direct_reads,
    "endings": lives.endings,
    "fork": lives.fork,
    "capture": captures.capture,
    "external-stream": captures.external_stream,
    "assertion": captures.assertion,
    "contexts": contexts.contexts,
}


@contextlib.contextmanager
def alone(timed: bool) -> Iterator[None]:
    """Probes start side by side; one that takes times measures while no other does."""
    path = os.environ.get("DISTORCH_REPORT_LOCK")
    if path is None:
        yield
        return
    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
        yield


def device_of(kind: str) -> torch.device:
    if kind == "sim":
        from distorch.testing import sim

        sim.configure(devices=2)
    return torch.device(kind, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PROBES)
    parser.add_argument("--device", choices=["cuda", "sim"], default="cuda")
    options = parser.parse_args()
    device = device_of(options.device)
    if device.type == "cuda" and options.name != "contexts":
        torch.cuda.init()
        torch.ones(1, device=device)
    with alone(options.name in TIMED):
        found = PROBES[options.name](device)
        print(json.dumps(found, default=str), flush=True)


if __name__ == "__main__":
    main()
