# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, on purpose: `python -m tests.gpu_report.faults hang --device sim`, or as tests.

The report runs these with --inject, to show that it survives them.
"""

import argparse
import ctypes
import os
import time

FLOOD = 48 << 20  # bytes
DEVICE = os.environ.get("DISTORCH_REPORT_DEVICE", "cuda")


def segfault():
    ctypes.string_at(0)


def hang():
    time.sleep(1e6)


def flood():
    """More than anybody wants to keep, then a failure whose last words must be kept."""
    line = b"a log without end " * 4096
    for _ in range(FLOOD // len(line)):
        os.write(1, line)
    raise AssertionError("injected: failed after a flood")


def sticky():
    """The device is lost to this process: every later use fails."""
    import torch

    if DEVICE == "sim":
        from distorch.testing import sim

        sim.configure(devices=2)
        sim.fail("device", "sim:0")
        (torch.ones(1).to("sim:0") + 1).cpu()
    else:
        numbers = torch.ones(4, device="cuda")
        numbers[torch.tensor([1 << 20], device="cuda")].cpu()  # an assertion on the device


FAULTS = {"segfault": segfault, "hang": hang, "flood": flood, "sticky": sticky}


def test_segfault():
    segfault()


def test_hang():
    hang()


def test_flood():
    flood()


def test_sticky():
    sticky()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fault", choices=FAULTS)
    FAULTS[parser.parse_args().fault]()
