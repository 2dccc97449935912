# SPDX-License-Identifier: Apache-2.0
"""The table of docs/sizing.md is what the benchmark computes."""

import re

import pytest

from benchmarks import machines
from distorch.shapes import MODELS
from tests.docs.snippets import ROOT

PAGE = (ROOT / "docs" / "sizing.md").read_text()


def test_the_page_has_all_machines_and_models():
    assert f"| machine | {' | '.join(MODELS)} |" in PAGE
    assert all(f"| `{machine}` |" in PAGE for machine in machines.MACHINES)


@pytest.mark.parametrize(("model", "machine"), [
    ("flux-dev", "rtx3060-pcie4x16-64gb-nvme4"),
    ("llama-70b", "rtx5090-pcie5x16-64gb-nvme4"),
    ("qwen-image", "2xrtx3090-pcie4x8-64gb-nvme4"),
])  # fmt: skip
def test_fields_are_as_computed(model, machine):
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{machine}` |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    said = cells[1 + list(MODELS).index(model)]
    found = machines.cell(machines.predicted(model, machine))
    # Other versions of PyTorch may have other operators in a norm.
    assert numbers(said) == pytest.approx(numbers(found), rel=0.03, abs=0.01)


def numbers(cell):
    """Those of a field, in their order."""
    return [float(number) for number in re.findall(r"[\d.]+", cell)]
