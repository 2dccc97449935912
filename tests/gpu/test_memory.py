# SPDX-License-Identifier: Apache-2.0
"""Memory on a GPU, and everything of this folder again with expandable segments."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.accelerator.memory import *  # noqa: F403

ROOT = Path(__file__).parents[2]
FILES = ("test_memory.py", "test_models.py", "test_streams.py")
# The setting's name, and the one of torch before 2.9.
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def asked_for():
    return any(EXPANDABLE in os.environ.get(name, "") for name in SETTINGS)


def test_the_allocator_is_the_one_asked_for(machine):
    found = torch.cuda.memory._snapshot()["allocator_settings"]
    assert found["expandable_segments"] == asked_for()


def test_all_of_it_with_expandable_segments():
    if asked_for():
        return  # this is that process
    torch.cuda.empty_cache()
    files = [str(Path(__file__).parent / name) for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        cwd=ROOT, env={**os.environ, **dict.fromkeys(SETTINGS, EXPANDABLE)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
