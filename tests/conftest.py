# SPDX-License-Identifier: Apache-2.0
"""Shared settings: one thread per test process, the same random numbers, no model hub, no GPU."""

import os
import tempfile
from pathlib import Path

# Other threads, too: the number of threads decides about last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A thread that would wait for the GIL with a mutex of the library's ends the process.
os.environ.setdefault("DISTORCH_CHECK_LOCKS", "1")
# Tests of the CPU and of the simulated accelerator must not change with the machine, so they and
# their child processes see no GPU. tests/gpu is run with DISTORCH_REQUIRE_CUDA=1.
if os.environ.get("DISTORCH_REQUIRE_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# PyTorch's cache of compiled code does not tell apart what it compiled for other capabilities of
# the CPU, and gives wrong numbers then (2.13), without distorch, too.
if _capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    _cache = Path(tempfile.gettempdir(), f"torchinductor_{_capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache))

import gc
import types

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """Modules that were imported are not looked through again at every gc.collect() of a test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _with_constants(code, changed):
    """Compiled code with other numbers in it, in its inner functions too."""

    def new(value):
        if isinstance(value, types.CodeType):
            return _with_constants(value, changed)
        return changed.get(value, value) if type(value) is int else value

    return code.replace(co_consts=tuple(new(value) for value in code.co_consts))


@pytest.fixture
def small_widths(monkeypatch):
    """diffusers' conversions have the released models' widths written in them."""
    from diffusers.loaders import single_file_model

    widths = {
        "FluxTransformer2DModel": {3072: 64}, "HunyuanVideoTransformer3DModel": {3072: 32},
        "Lumina2Transformer2DModel": {2304: 48, 768: 24},
    }  # fmt: skip
    for name, changed in widths.items():
        entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]
        function = entry["checkpoint_mapping_fn"]
        code = _with_constants(function.__code__, changed)
        small_one = types.FunctionType(code, function.__globals__)
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", small_one)
