# SPDX-License-Identifier: Apache-2.0
"""Well-known models on machines that are not at hand: the table of docs/sizing.md.

Estimated, not measured: operators from their shapes, machines from data sheets. It is what
`distorch plan --model MODEL auto --machine MACHINE` prints, for all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import distorch
from distorch import shapes

MACHINES = (
    "rtx3060-pcie4x16-64gb-nvme4",
    "rtx4060ti-pcie4x8-64gb-nvme4",
    "rtx3090-pcie4x16-64gb-nvme4",
    "rtx4090-pcie4x16-64gb-nvme4",
    "rtx5090-pcie5x16-64gb-nvme4",
    "2xrtx3090-pcie4x8-64gb-nvme4",
)


def predicted(model: str, machine: str) -> distorch.Prediction:
    """A step with the placement that "auto" chooses."""
    module = shapes.model_named(model)
    usual = shapes.shape_named(model).usual
    step = shapes.estimated(module, usual, distorch.Machine.named(machine))
    return distorch.predict(module, step, "auto", machine=machine)


def cell(found: distorch.Prediction) -> str:
    """Bytes of weights on the GPU, the step, and the step if all weights were there."""
    held = found.plan.bytes.get(found.plan.compute, 0) / 2**30
    return f"{held:.1f} GB: {seconds(found.seconds)} ({seconds(found.compute_seconds)})"


def seconds(value: float) -> str:
    """With two or three digits."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.2f} s"


def rows(machines: tuple[str, ...] = MACHINES) -> Iterator[str]:
    """The lines of the table."""
    yield f"| machine | {' | '.join(shapes.MODELS)} |"
    yield "|---" * (len(shapes.MODELS) + 1) + "|"
    for machine in machines:
        cells = (cell(predicted(model, machine)) for model in shapes.MODELS)
        yield f"| `{machine}` | {' | '.join(cells)} |"


def main() -> None:
    """Prints the table as Markdown."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
