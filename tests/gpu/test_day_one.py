# SPDX-License-Identifier: Apache-2.0
"""The first day with a GPU: what is the same everywhere, and what only CUDA has."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import distorch
from tests.accelerator.day_one import *  # noqa: F403
from tests.accelerator.day_one import (
    DONORS,
    batch,
    chain,
    check_a_write,
    offloaded,
    result,
    same,
    warm,
    weights,
)
from tests.accelerator.exits import *  # noqa: F403
from tests.accelerator.exits import run_program
from tests.accelerator.programs import *  # noqa: F403
from tests.accelerator.streams import in_threads
from tests.accelerator.training import *  # noqa: F403
from tests.accelerator.training import loss_of
from tests.accelerator.with_libraries import *  # noqa: F403

ROOT = Path(__file__).parents[2]
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ASYNC = "backend:cudaMallocAsync"


@pytest.mark.parametrize("donor", DONORS)
def test_data_replaced_behind_a_forward(machine, donor):
    """PyTorch has `.data =` between unlike tensors for its own devices only, not on a simulated one."""

    def replace(model, new):
        for name, weight in model.named_parameters():
            weight.data = new[name]

    check_a_write(machine, donor, replace, machine.device)


# ---- memory ------------------------------------------------------------------


def test_streams_and_models_with_cuda_malloc_async():
    files = [str(Path(__file__).parent / name) for name in ("test_streams.py", "test_models.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not compiled and not reduce", *files],
        cwd=ROOT, env={**os.environ, **dict.fromkeys(SETTINGS, ASYNC)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_pressure_with_cuda_malloc_async(machine):
    """Ring, activations and hoarded memory in the driver's own pool, and all given back."""
    program = """
    assert torch.cuda.get_allocator_backend() == "cudaMallocAsync"
    resident = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(6)))
    resident.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = resident.to(device)(x)
    del resident
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((2 << 30) / total)
    got = []
    for turn in range(12):
        hoard = []
        for _ in range(3):
            forward()  # the ring is there again: it is what there is to give back
        for size in (1 << 28, 1 << 22, 1 << 16, 1 << 12):
            try:
                while True:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                pass
        got.append(forward())
    del hoard
    assert all(torch.equal(y, wanted) for y in got)
    """
    done = run_program(machine, program, **dict.fromkeys(SETTINGS, ASYNC))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("donor", DONORS)
def test_weights_of_a_gigabyte(machine, donor):
    """Sixteen times the ring; a write to some of its rows, and the rest is as it was."""
    torch.manual_seed(0)
    options = {"bias": False, "device": machine.device, "dtype": torch.bfloat16}
    plain = nn.Sequential(nn.Linear(16384, 32768, **options), nn.Linear(32768, 64, **options))
    x = torch.randn(4, 16384, device=machine.device, dtype=torch.bfloat16)
    wanted = result(plain, x)
    spec = f"{machine.device},0b;{donor},*"
    model = distorch.distribute(plain, spec, min_bytes=0, prefetch="64mb")
    got = [result(model, x) for _ in range(2)]
    with torch.no_grad():
        model[0].weight[:4].zero_()
    after = result(model[0], x)
    assert same(got, [wanted] * 2)
    assert after[:, :4].count_nonzero() == 0
    assert after[:, 4:].count_nonzero() > 0


# ---- streams, captures, faults -----------------------------------------------


def test_a_stream_of_another_library_that_is_gone(machine):
    """cuFFT, NCCL and others make streams, lend them and destroy them."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    wanted = result(plain, x)
    machine.module.synchronize()
    runtime = torch.cuda.cudart()
    for _ in range(3):
        handle = ctypes.c_ulonglong(0)
        assert int(runtime.cudaStreamCreate(ctypes.addressof(handle))) == 0
        stream = torch.cuda.ExternalStream(handle.value, device=machine.device)
        with torch.cuda.stream(stream):
            got = result(model, x)
            stream.synchronize()
            assert torch.equal(got, wanted)
            stream.synchronize()
        del got
        assert int(runtime.cudaStreamDestroy(handle.value)) == 0
        assert torch.equal(result(model, x), wanted)


def test_a_capture_in_another_thread(machine):
    """With "thread_local", as docs/gpu.md says, while this thread fetches."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    wanted = result(plain, x)
    warm(machine, model, x)
    ended = threading.Event()
    stream = torch.cuda.Stream()

    def work(index):
        if index == 0:
            try:
                right = True
                with torch.cuda.stream(stream):
                    result(
                        plain, x
                    )  # this thread's handle of cuBLAS: none can be made in a capture
                stream.synchronize()
                for _ in range(10):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                        held = result(plain, x)
                    graph.replay()
                    right = right and torch.equal(held, wanted)
                return right
            finally:
                ended.set()
        right, turns = True, 0
        while right and not (ended.is_set() and turns):
            right = torch.equal(result(model, x), wanted)
            turns += 1
        return right

    assert all(in_threads(2, work))


def test_a_device_assert_of_the_users_own(machine):
    """The device is lost, as it is without distorch: errors, and the process ends."""
    program = """
    table = torch.zeros(3, device=device)
    y = forward()
    table[torch.tensor([7], device=device)]
    told = []
    for _ in range(3):
        try:
            forward().cpu()
        except RuntimeError as error:
            assert not isinstance(error, distorch.DistorchError), error  # it is about no weight
            told.append(str(error))
    assert len(told) == 3, told
    assert any("assert" in text for text in told), told
    del model
    sys.exit(7)
    """
    done = run_program(machine, program)
    assert done.returncode == 7, done.stderr[-4000:]


def test_half_precision_with_a_scaler(machine):
    """Its first steps overflow: they are left out, and weights stay as they are."""
    plain = chain(machine, count=4).float()
    model = offloaded(machine, plain)
    xs = [batch(machine, seed=seed).float() for seed in range(6)]
    results = []
    for module in (plain, model):
        scaler = torch.amp.GradScaler(machine.type, init_scale=2.0**40)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        losses = []
        for x in xs:
            with torch.autocast(machine.type, dtype=torch.float16):
                loss = loss_of(module, x)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append(losses)
    assert same(*results)
    assert same(weights(model), weights(plain))
    assert not torch.equal(results[0][0], results[0][-1])
