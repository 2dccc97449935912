# SPDX-License-Identifier: Apache-2.0
"""The short forms of the programs in this folder, and loads of unusual size."""

import copy
import json
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from tests.amount import ALL
from tests.reliability import faults, kills, sanitized, soak, watchdog

X = torch.ones(1, 64)


def test_kills():
    kills.run(60 if ALL else 4, seed=1)


def test_processes_that_stand_still_for_a_moment():
    kills.run(10 if ALL else 1, seed=2, stop=1.0)


@pytest.mark.skipif(
    shutil.which("bindfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK),
    reason="needs bindfs, and a system that lets it mount",
)
def test_disks_that_stand_still_for_a_moment():
    kills.run(10 if ALL else 1, seed=3, stop=1.0, disk=True)


def test_interrupts(tmp_path):
    """In a process of its own: a test runner does not like signals."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.interrupts", "200" if ALL else "12"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing lost, nothing left" in done.stdout


def test_faults():
    """Every call of the library fails once. Here: two of each kind, in a few operations."""
    most, operations = (25, faults.OPERATIONS) if ALL else (2, ("load", "merge", "to disk", "step"))
    assert faults.run(most, operations) == []


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
def test_programs_of_threads(device):
    count = "100" if ALL else "12"
    said = watchdog.run(
        ["-m", "tests.reliability.threads", "--here", count, "--device", device],
        env={"OMP_NUM_THREADS": "1", "DISTORCH_CHECK_LOCKS": "1"},
    )
    assert f"{count} programs" in said


def test_soak():
    said = watchdog.run(
        ["-m", "tests.reliability.soak", "--here", "--hours", "0.2" if ALL else "0"],
        env={"OMP_NUM_THREADS": "1"},
    )
    assert "every output was right, and nothing grew" in said


@pytest.mark.parametrize(
    ("kind", "more"), [("memory", 1 << 20), ("threads", 1), ("files", 1), ("pinned", 512)]
)
def test_a_soak_finds_what_grows(kind, more):
    still = soak.Held(memory=1 << 28, threads=3, files=6, pinned=0, on_devices=0)
    assert soak.grown([still] * 100) == ""
    slowly = [replace(still, **{kind: getattr(still, kind) + i * more}) for i in range(100)]
    assert soak.grown(slowly).startswith(kind)
    # It may take a while until everything was there once.
    assert soak.grown([*slowly[:25], *[slowly[25]] * 75]) == ""


def test_the_watchdog_says_where_a_program_stands():
    """Two threads that wait for each other, without the GIL and for ever."""
    program = """
import threading
one, two = threading.Lock(), threading.Lock()
def work(mine, other, both=threading.Barrier(2)):
    with mine:
        both.wait()
        the_line_where_it_stands(other)
def the_line_where_it_stands(lock):
    lock.acquire()
print("it begins", flush=True)
for locks in ((one, two), (two, one)):
    threading.Thread(target=work, args=locks).start()
"""
    with pytest.raises(watchdog.StoppedError) as stopped:
        watchdog.run(["-c", program], patience=2)
    text = str(stopped.value)
    assert "nothing was printed for 2 s" in text and "it begins" in text
    assert text.count("in the_line_where_it_stands") == 2


def test_the_watchdog_tells_of_a_crash():
    with pytest.raises(watchdog.StoppedError, match="it ended with -11") as stopped:
        watchdog.run(["-c", "import ctypes; ctypes.string_at(0)"])
    assert "Segmentation fault" in str(stopped.value)
    assert "by itself" in watchdog.run(["-c", "print('by itself')"])


def test_reports_of_the_sanitizer_that_are_torch_s_own():
    access = """WARNING: ThreadSanitizer: data race (pid=1)
  Write of size 8 at 0x7b by thread T1:
    #0 operator delete(void*, unsigned long) ../tsan_new_delete.cpp:150 (libtsan.so.2+0x86c3d)
    #1 {} <null> (libtorch_cpu.so+0x5)

  Previous atomic read of size 1 at 0x7b by thread T2:
    #0 distorch::Ring::load() /x/ring.cpp:1 (_C.so+0x1)
    #1 torch::autograd::Engine::thread_main() <null> (libtorch_cpu.so+0x6)

SUMMARY: ThreadSanitizer: data race
"""
    assert sanitized.is_ours(access.format("distorch::Slot::~Slot()"))
    assert not sanitized.is_ours(access.format("torch::autograd::Engine::execute()"))


def chain(count, width=64):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).eval()


def test_many_threads_on_many_models_of_one_ring():
    """32 threads, 8 models whose ring holds a few weights: every output is the resident one."""
    check_many_threads("cpu", "cpu,0b;disk,*")


def check_many_threads(device, spec):
    models = [chain(6) for _ in range(8)]
    with torch.no_grad():
        wanted = [copy.deepcopy(model).to(device)(X.to(device)).cpu() for model in models]
    for model in models:
        distorch.distribute(model, spec, min_bytes=0, prefetch="64kb")
    wrong, x = [], X.to(device)

    def use(number):
        try:
            with torch.no_grad():
                for i in range(20):
                    which = (number + i) % len(models)
                    if not torch.equal(models[which](x).cpu(), wanted[which]):
                        wrong.append(which)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_thousands_of_parameters():
    count = 5000 if ALL else 1000
    model = nn.ModuleList([nn.Linear(8, 8) for _ in range(count)]).eval()
    x = torch.ones(1, 8)
    wanted = [layer(x) for layer in model]
    distorch.distribute(model, "cpu,50%;disk,*", min_bytes=0)
    assert all(torch.equal(layer(x), y) for layer, y in zip(model, wanted, strict=True))
    distorch.redistribute(model, "disk,*")
    assert len(model.state_dict()) == 2 * count and distorch.report(model).ok
    distorch.undistribute(model)
    assert all(torch.equal(layer(x), y) for layer, y in zip(model, wanted, strict=True))


def test_names_of_ten_kilobytes(tmp_path):
    model = nn.Sequential()
    for i in range(4):
        model.add_module("n" * 10_000 + str(i), nn.Linear(64, 64))
    wanted = model(X)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    distorch.load(model, tmp_path / "m.safetensors", "disk,*", min_bytes=0)
    assert torch.equal(model(X), wanted)
    report = distorch.report(model)
    with distorch.trace(model, tmp_path / "t.json") as timeline:
        model(X)
    assert str(report) and report.plot().svg() and str(timeline) and timeline.plot().svg()


def test_hundreds_of_loras(tmp_path):
    model, count = chain(4), 2000 if ALL else 300
    for i in range(count):
        state = {f"{i % 4}.lora_A.weight": torch.randn(2, 64),
                 f"{i % 4}.lora_B.weight": torch.randn(64, 2)}  # fmt: skip
        save_file(state, tmp_path / f"{i}.safetensors")
    loras = [(tmp_path / f"{i}.safetensors", 0.01) for i in range(count)]
    wanted = model(X)
    distorch.distribute(model, "disk,*", min_bytes=0)
    for mode in ("merge", "fetch", "background"):
        distorch.set_loras(model, loras, lora_mode=mode)
        distorch.finish_merging(model)
        assert not torch.equal(model(X), wanted)
        distorch.set_loras(model, [])
        assert torch.equal(model(X), wanted)


def test_a_weight_that_is_larger_than_the_memory(tmp_path):
    """A named error, and the rest of the model goes on."""
    size = 1 << 42
    header = {"z": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
              "a": {"dtype": "F32", "shape": [8], "data_offsets": [size, size + 32]}}  # fmt: skip
    text = json.dumps(header).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size + 32)  # a hole: it takes no room on the disk
    module = nn.Module()
    module.z = nn.Parameter(torch.empty(size // 4, device="meta"))
    module.a = nn.Parameter(torch.ones(8))
    distorch.load(module, tmp_path / "m.safetensors", "cpu,0b;disk,*", min_bytes=0)
    with pytest.raises(distorch.FetchError, match=f"no memory for a weight of {size} bytes"):
        module.z + 1
    with pytest.raises(distorch.PlacementError, match=r"4.00 TiB\) on cpu, which has"):
        distorch.redistribute(module, "cpu,*")
    assert torch.equal(module.a + 1, torch.ones(8))
