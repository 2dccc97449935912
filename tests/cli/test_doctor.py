# SPDX-License-Identifier: Apache-2.0
"""The doctor: what it looks at, what it finds wrong, and the command that mends it."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import distorch
from distorch import _native, _ops
from distorch.cli import doctor, main
from distorch.cli.doctor import disks, gpus, nvidia
from distorch.cli.doctor.findings import Check, Findings, tried
from distorch.machine import links

USABLE = "the folder for donor files can be used"
RATE = "the disk is fast enough to stream from"
EXPORT = "export DISTORCH_DISK="


def by_name(checks):
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    for check in checks:
        # A command is one line that a shell can read, and only what is not ok has one.
        subprocess.run(["bash", "-n", "-c", check.command], check=True)
        assert "\n" not in check.command
        assert check.state in ("slow", "NO") or not (check.command or check.hint)
        assert check.state in ("ok", "--") or check.command or check.hint
    return found


def examined():
    return by_name(doctor.examine().checks)


def test_this_machine(capsys):
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert status == (0 if findings["ok"] else 1)
    states = {check["name"]: check["state"] for check in findings["checks"]}
    assert states["a weight in RAM gives the same bits"] == "ok"
    assert states["a weight on disk gives the same bits"] == "ok"
    assert states[USABLE] == "ok" and RATE in states
    assert {"cpu", "disk"} <= set(findings["devices"])
    assert findings["versions"]["torch"] == torch.__version__
    assert {"CUDA of torch", "NVIDIA driver", "CUDA kernels"} <= set(findings["versions"])
    assert main(["doctor"]) == status
    assert "same bits" in capsys.readouterr().out


def test_links_are_a_list(monkeypatch):
    known = links.Calibration((links.Link("cpu", "cuda:0", 1e9, 0.0, 1e9, None),))
    found = Findings({}, {}, "/x", [], known).to_dict()
    assert [link["donor"] for link in found["links"]] == ["cpu"]
    assert Findings({}, {}, "/x", []).to_dict()["links"] is None


def test_it_says_what_to_do():
    wrong = Check("the disk has room", "NO", "3 B free", "export DISTORCH_DISK=/mnt")
    slow = Check("the disk reads", "slow", "0.10 GB/s", hint="take another")
    both = Check("kernels", "slow", "not built", "pip install .", "in its folder")
    fine, unneeded = Check("torch", "ok", "2.13.0"), Check("a GPU", "--", "there is none")
    findings = Findings({}, {}, "/x", [slow, fine, both, wrong, unneeded])
    assert not findings.ok
    assert str(findings).endswith(
        "Wrong:\n  the disk has room: 3 B free\n      export DISTORCH_DISK=/mnt\n"
        "Works, but slowly:\n  the disk reads: 0.10 GB/s\n      (take another)\n"
        "  kernels: not built\n      pip install .\n      (in its folder)"
    )
    assert Findings({}, {}, "/x", [slow, fine]).ok
    assert str(Findings({}, {}, "/x", [fine, unneeded])).endswith("Nothing is wrong.")


def test_a_failure_is_one_line_of_the_table():
    def fails():
        raise RuntimeError(
            "CUDA error: no kernel image\nCUDA kernel errors might be\nFor debugging"
        )

    assert tried("x", fails).found == "RuntimeError: CUDA error: no kernel image"
    assert tried("x", lambda: 1 / 0, "make").command == "make"
    assert len(tried("x", lambda: (_ for _ in ()).throw(ValueError("x" * 999))).found) == 160


# --- disks ---


def run(folder, **environment):
    """The checks of a new process with another folder for donor files."""
    done = subprocess.run(
        [sys.executable, "-m", "distorch", "doctor", "--json"], check=False, capture_output=True,
        text=True, env={**os.environ, "DISTORCH_DISK": str(folder), **environment},
    )  # fmt: skip
    findings = json.loads(done.stdout)
    assert done.returncode == (0 if findings["ok"] else 1)
    assert not done.stderr
    return by_name([Check(**check) for check in findings["checks"]])


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    wrong = run(tmp_path / "file")[USABLE]
    assert wrong.state == "NO" and wrong.found.endswith("file' is a file")
    assert wrong.command.startswith(EXPORT) and Path(wrong.command.removeprefix(EXPORT)).is_dir()
    missing = tmp_path / "it's new"
    wrong = run(missing)[USABLE]
    assert wrong.state == "NO" and wrong.found.endswith("is not there")
    assert wrong.command == f"mkdir -p {shlex.quote(str(missing))}"
    subprocess.run(["bash", "-c", wrong.command], check=True)
    assert run(missing)[USABLE].state == "ok"
    assert list(missing.iterdir()) == []


def refuses(*arguments, **options):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("what", ["tempfile.TemporaryFile", "pathlib.Path.is_dir"])
def test_a_folder_that_refuses(monkeypatch, tmp_path, what):
    monkeypatch.setattr(disks, "_elsewhere", lambda: {"command": "export DISTORCH_DISK=/other"})
    monkeypatch.setattr(what, refuses)
    (wrong,) = disks.checks(tmp_path)
    assert wrong.state == "NO" and wrong.found.endswith(": Permission denied")
    assert wrong.command == "export DISTORCH_DISK=/other"


def test_a_folder_in_ram(monkeypatch, tmp_path):
    monkeypatch.setattr("distorch._native.in_memory", lambda folder: folder == tmp_path)
    found = by_name(disks.checks(tmp_path))
    wrong = found["donor files go to a disk, not to RAM"]
    assert wrong.state == "NO" and wrong.command.startswith(EXPORT)
    assert RATE not in found  # the rate of RAM says nothing


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(100 << 30, 0, 1 << 20))
    found = by_name(disks.checks(tmp_path))
    assert found["the disk has room"].state == "NO"
    assert found["the disk has room"].found == "1.00 MiB free"
    assert RATE not in found


def test_the_folder_that_it_names(monkeypatch, tmp_path):
    """On a disk, usable, and with the most room."""
    home, here = tmp_path / "home", tmp_path / "my folder"
    free = {Path("/var/tmp"): 3 << 30, here: 5 << 30, home: 9 << 30}
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(0, 0, free[folder]))
    in_ram = {home}
    monkeypatch.setattr("distorch._native.in_memory", lambda folder: folder in in_ram)
    assert disks._elsewhere() == {"command": f"export DISTORCH_DISK='{here}'"}
    in_ram.clear()
    assert disks._elsewhere() == {"command": f"export DISTORCH_DISK={home}"}
    free |= dict.fromkeys(free, 1 << 20)
    assert "none was found" in disks._elsewhere()["hint"]


def test_without_unbuffered_reads(monkeypatch, tmp_path):
    name = "files are read without taking RAM"
    assert by_name(disks.checks(tmp_path))[name].found == "yes (O_DIRECT)"
    opened = os.open

    def no_direct(path, flags, *mode, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", no_direct)
    found = by_name(disks.checks(tmp_path))
    assert found[name].state == "slow"
    assert found[RATE].found.endswith("perhaps from the page cache")


def test_the_rate_of_the_disk(monkeypatch, tmp_path):
    measured = disks._rate_check(True)
    rate = float(measured.found.split()[0])
    assert 0.001 < rate < 1000 and measured.found.endswith("measured without the page cache")
    monkeypatch.setattr(disks, "measure_disk", lambda: 0.1e9)
    slow = disks._rate_check(True)
    assert slow.state == "slow" and slow.found.startswith("0.10 GB/s") and slow.hint
    monkeypatch.setattr(disks, "measure_disk", lambda: 1 / 0)
    assert disks._rate_check(True).found == "ZeroDivisionError: division by zero"


def test_the_rate_is_that_of_a_read(monkeypatch):
    monkeypatch.setattr(links, "_fetch_seconds", lambda nbytes, tier, device: nbytes / 2e9)
    assert links.measure_disk() == pytest.approx(2e9)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTORCH_DISK", "~/donors")
    assert _native.scratch_folder() == tmp_path / "donors"
    monkeypatch.setenv("DISTORCH_DISK", "~nobody-at-all/donors")
    assert _native.scratch_folder() == Path("~nobody-at-all/donors")


def test_a_mount_with_a_blank_in_its_name(monkeypatch, tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    mounts = f"/dev/sda / ext4 rw 0 0\ntmpfs {tmp_path}/a\\040b tmpfs rw 0 0\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: mounts)
    assert _native.in_memory(folder) and not _native.in_memory(tmp_path)


def test_a_user_without_a_home(monkeypatch):
    """As in a container that runs as a number: no HOME, no entry in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr("distorch._native.user_cache_path", no_home)
    monkeypatch.setattr(links, "_known", {})
    with pytest.raises(RuntimeError):
        Path.home()
    assert doctor.examine().ok
    assert main(["calibrate"]) == 0
    monkeypatch.setattr("distorch._native.in_memory", lambda folder: True)
    monkeypatch.delenv("DISTORCH_DISK", raising=False)
    assert str(_native.scratch_folder()) == tempfile.gettempdir()


def no_home(name):
    raise RuntimeError("Could not determine home directory.")


# --- GPUs that torch does not see ---


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine as the test says: a torch, a device on the bus, a driver and the CUDA it runs."""

    def make(*, cuda="13.0", hip=None, on_bus="0x0c0300", vendor="0x10de", driver="", newest=None,
             hidden=None):  # fmt: skip
        (tmp_path / "version").unlink(missing_ok=True)
        if driver:
            (tmp_path / "version").write_text(driver)
        device = tmp_path / "pci" / "0000:01:00.0"
        device.mkdir(parents=True, exist_ok=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{on_bus}\n")
        monkeypatch.setattr(nvidia, "_DRIVER", tmp_path / "version")
        monkeypatch.setattr(nvidia, "_PCI", tmp_path / "pci")
        monkeypatch.setattr(nvidia, "driver_cuda", lambda: newest)
        monkeypatch.setattr("torch.version.cuda", cuda)
        monkeypatch.setattr("torch.version.hip", hip)
        monkeypatch.setattr("torch.__version__", "2.13.0+cpu")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        seen, pinned = gpus.checks([])
        by_name([seen, pinned])
        assert pinned.state == "--"
        return seen

    return make


DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC version: 12"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build"
VGA, SOUND = "0x030000", "0x040300"


@pytest.mark.parametrize(
    ("what", "state", "found", "todo"),
    [
        ({}, "--", "no NVIDIA GPU", ""),
        ({"cuda": None}, "--", "no NVIDIA GPU", ""),
        ({"on_bus": SOUND}, "--", "no NVIDIA GPU", ""),
        ({"on_bus": VGA, "vendor": "0x1002"}, "--", "no NVIDIA GPU", ""),
        ({"on_bus": VGA}, "NO", "no driver", "nvidia.com/drivers"),
        ({"on_bus": "0x030200"}, "NO", "no driver", "nvidia.com/drivers"),
        ({"driver": DRIVER, "newest": (13, 0), "hidden": "-1"}, "--", "CUDA_VISIBLE_DEVICES='-1'", ""),
        ({"driver": DRIVER}, "NO", "libcuda.so.1", "docker run --gpus all"),
        ({"cuda": None, "driver": DRIVER, "newest": (12, 9)}, "slow", "built for CPUs",
         "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu128"),
        ({"cuda": None, "driver": DRIVER, "newest": (11, 8)}, "slow", "built for CPUs",
         "https://pytorch.org/get-started"),
        ({"driver": DRIVER, "newest": (12, 6)}, "NO", "CUDA 13.0; the driver runs CUDA up to 12.6",
         "https://download.pytorch.org/whl/cu126"),
        ({"cuda": "12.8", "driver": DRIVER, "newest": (12, 2)}, "NO", "not compiled with CUDA",
         "restart"),  # minor versions do not matter
        ({"driver": DRIVER, "newest": (13, 1)}, "NO", "not compiled with CUDA", "restart"),
        ({"cuda": None, "hip": "6.4"}, "NO", "ROCm 6.4, which distorch does not support", "CPU works"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_does_not_see(machine, what, state, found, todo):
    check = machine(**what)
    assert check.state == state
    assert found in check.found
    assert todo in f"{check.command} {check.hint}"


def test_the_driver_is_named(machine):
    for text, version in (
        (DRIVER, "580.65.06"),
        (OPEN, "570.86.15"),
        ("?", "of an unknown version"),
    ):
        machine(driver=text)
        assert nvidia.driver() == version and nvidia.has_gpu()
    machine(newest=(12, 4))  # WSL and Jetson have the library, and no such file
    assert nvidia.driver() == "of an unknown version" and nvidia.has_gpu()
    assert nvidia.versions()["NVIDIA driver"] == "of an unknown version, up to CUDA 12.4"
    machine()
    assert nvidia.driver() is None and not nvidia.has_gpu()
    assert nvidia.versions()["NVIDIA driver"] == "none"
    machine(cuda=None, hip="6.4")
    assert nvidia.versions()["CUDA of torch"] == "ROCm 6.4"


def test_the_driver_says_what_cuda_it_runs(monkeypatch, tmp_path):
    """Asked in a real library, which is built here."""
    source = tmp_path / "cuda.c"
    library = tmp_path / "libcuda.so.1"
    for number, status, expected in ((13020, 0, (13, 2)), (12060, 0, (12, 6)), (0, 3, None)):
        source.write_text(f"int cuDriverGetVersion(int* v) {{ *v = {number}; return {status}; }}")
        library = tmp_path / f"libcuda-{number}.so"
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
        monkeypatch.setattr(nvidia, "_LIBRARY", str(library))
        assert nvidia.driver_cuda() == expected
    monkeypatch.setattr(nvidia, "_LIBRARY", str(tmp_path / "none.so"))
    assert nvidia.driver_cuda() is None


def test_how_the_kernels_were_built(monkeypatch, tmp_path):
    library = tmp_path / "_cuda.so"
    monkeypatch.setattr("distorch._native.CUDA_LIBRARY", library)
    assert nvidia.kernels() == "not built"
    noted = b"distorch kernels: CUDA 13.0, architectures 750,800,900,1200"
    for text, said in (
        (noted, "built with CUDA 13.0 for GPUs of 7.5, 8.0, 9.0, 12.0"),
        (b"of an older distorch", "built"),
    ):
        library.write_bytes(b"\x7fELF" + b"\0" * 5000 + text + b"\0" * 100)
        assert nvidia.kernels() == said


def test_the_library_says_how_it_was_built(tmp_path):
    """The line of csrc/cuda/library.cu, compiled with what nvcc defines."""
    source = (Path(distorch.__file__).parents[1] / "csrc" / "cuda" / "library.cu").read_text()
    begin, end = source.index("#define DISTORCH_TEXT_OF"), source.index("namespace distorch::cuda")
    (tmp_path / "text.cpp").write_text(source[begin:end])
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-D__CUDACC_VER_MAJOR__=12", "-D__CUDACC_VER_MINOR__=8",
         "-D__CUDA_ARCH_LIST__=860,1200", tmp_path / "text.cpp", "-o", tmp_path / "text.so"],
        check=True,
    )  # fmt: skip
    from distorch._library import kernels_of

    assert kernels_of(tmp_path / "text.so") == ("CUDA 12.8", [86, 120])
    (tmp_path / "empty.so").write_bytes(b"")
    assert kernels_of(tmp_path / "empty.so") is None


# --- an accelerator that torch sees: the simulated one ---


@pytest.fixture
def sim():
    from distorch.testing import sim

    sim.configure(devices=2, links={("sim:0", "sim:1"): (1e9, 0.0), ("sim:1", "sim:0"): (1e9, 0.0)})
    yield sim
    sim.configure(devices=2)


def test_each_accelerator_is_tried(sim):
    found = by_name(gpus.checks(["sim:0", "sim:1"]))
    assert set(found) == {
        "torch sees the GPU",
        "a weight in RAM for sim:0 gives the same bits",
        "a weight on sim:1 for sim:0 gives the same bits",
        "memory can be pinned for sim:0",
        "a weight in RAM for sim:1 gives the same bits",
        "a weight on sim:0 for sim:1 gives the same bits",
        "memory can be pinned for sim:1",
    }
    assert {check.state for check in found.values()} == {"ok"}
    everything = examined()
    for compute in ("", " for sim:0", " for sim:1"):
        assert everything[f"a weight on disk{compute} gives the same bits"].state == "ok"
    assert found["memory can be pinned for sim:0"].found.startswith("256.00 MiB in ")
    assert set(found) <= set(everything)


def test_a_weight_that_comes_back_wrong(sim, monkeypatch):
    shard = distorch.shard
    monkeypatch.setattr(distorch, "shard", lambda weight, donor: shard(weight + 1, donor))
    wrong = gpus.bits_check("cpu", "sim:0")
    assert wrong.state == "NO" and "they differ" in wrong.found
    monkeypatch.setattr(distorch, "shard", lambda weight, donor: 1 / 0)
    assert gpus.bits_check("cpu", "sim:0").found == "ZeroDivisionError: division by zero"


def test_memory_that_cannot_be_pinned(sim, monkeypatch):
    monkeypatch.setattr(_ops, "pinned_memory", lambda nbytes, device: 1 / 0)
    wrong = by_name(gpus.checks(["sim:0"]))["memory can be pinned for sim:0"]
    assert wrong.state == "NO" and "ZeroDivisionError" in wrong.found and wrong.hint


def test_the_kernels_are_run(sim, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr("distorch._native.has_cuda_kernels", lambda: True)
    good = gpus._kernels_check("sim:0")
    assert good.state == "ok" and good.found.startswith("yes, ")
    monkeypatch.setattr(_ops, "can_decode", lambda device: False)
    wrong = gpus._kernels_check("sim:0")
    assert wrong.state == "NO" and "no kernels for sim:0" in wrong.found
    assert wrong.command == (
        "DISTORCH_CUDA=1 DISTORCH_GPUS=89 pip install --force-reinstall --no-deps ."
    )
    monkeypatch.setattr("distorch._native.has_cuda_kernels", lambda: False)
    missing = gpus._kernels_check("sim:0")
    assert missing.state == "slow" and missing.found.startswith("not built")
    for check in (good, wrong, missing):
        by_name([check])
