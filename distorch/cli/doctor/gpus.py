# SPDX-License-Identifier: Apache-2.0
"""Whether torch sees the GPUs that are there, and whether weights come back to them."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

import distorch
from distorch import _native, _ops
from distorch.cli.doctor import nvidia
from distorch.cli.doctor.findings import Check, first_line, tried
from distorch.display.tables import human_bytes

_PINNED_BYTES = 256 << 20
_REPORT = "please report this, with all that is printed above"
_SEEN = "torch sees the GPU"
# Builds of torch for CUDA that pytorch.org offers beside each other.
_CUDA_OF_TORCH = ((12, 6), (12, 8), (13, 0))


def checks(accelerators: list[str]) -> list[Check]:
    """Tries every accelerator that torch sees, such as "cuda:0". If there is none, says why."""
    found = [_seen(accelerators)]
    if not accelerators:
        return [*found, Check("memory can be pinned", "--", "not needed: there is no accelerator")]
    for device in accelerators:
        found.append(bits_check("cpu", device))
        found += [bits_check(other, device) for other in accelerators if other != device]
        found.append(_pinned_check(device))
        if device.startswith("cuda"):
            found.append(_kernels_check(device))
    return found


def bits_check(donor: str, compute: str) -> Check:
    """Whether an operator gives the same bits with a weight on a donor as with a resident one."""

    def try_it() -> str:
        weight, x = (torch.randn(rows, 64).to(compute) for rows in (64, 8))
        linear = nn.functional.linear
        fetched = linear(x, distorch.shard(weight, donor))
        if not torch.equal(fetched, linear(x, weight)):
            raise RuntimeError("they differ")
        return "the same"

    where = {"cpu": "in RAM", "disk": "on disk"}.get(donor, f"on {donor}")
    to = "" if compute == "cpu" else f" for {compute}"
    return tried(f"a weight {where}{to} gives the same bits", try_it, hint=_REPORT)


def _seen(accelerators: list[str]) -> Check:
    if torch.version.hip is not None:
        found = f"this torch is built for ROCm {torch.version.hip}, which distorch does not support"
        return Check(_SEEN, "NO", found, hint='the CPU works: compute="cpu"')
    if accelerators:
        return Check(_SEEN, "ok", ", ".join(accelerators))
    if not nvidia.has_gpu():
        return Check(_SEEN, "--", "there is no NVIDIA GPU: the CPU computes")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and torch.version.cuda is not None:
        return Check(_SEEN, "--", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}: the CPU computes")
    return _unseen()


def _unseen() -> Check:
    """Why torch does not see the GPU of this machine, and what to do."""
    cuda, newest = torch.version.cuda, nvidia.driver_cuda()
    if nvidia.driver() is None:
        found = "there is a GPU, and no driver of NVIDIA"
        return Check(_SEEN, "NO", found, hint="install the driver: https://www.nvidia.com/drivers")
    if newest is None:
        found = "the driver's library, libcuda.so.1, does not load: a container without its GPUs?"
        return Check(_SEEN, "NO", found, hint="start the container with: docker run --gpus all")
    if cuda is None:
        found = "this torch is built for CPUs: the GPU is not used"
        return Check(_SEEN, "slow", found, _other_torch(newest), _BUILD_AGAIN)
    if newest[0] < int(cuda.split(".", maxsplit=1)[0]):  # minor versions do not matter
        found = f"torch is for CUDA {cuda}; the driver runs CUDA up to {newest[0]}.{newest[1]}"
        hint = f"or update the driver: https://www.nvidia.com/drivers. {_BUILD_AGAIN}"
        return Check(_SEEN, "NO", found, _other_torch(newest), hint)
    hint = "after an update of the driver, restart the machine; nvidia-smi says more"
    return Check(_SEEN, "NO", _words_of_torch(), hint=hint)


_BUILD_AGAIN = (
    "https://pytorch.org/get-started has other builds; distorch is built against torch: install it "
    "again afterwards, in its folder"
)


def _other_torch(newest: tuple[int, int]) -> str:
    """The command that installs this version of torch for the CUDA of the driver."""
    fitting = [cuda for cuda in _CUDA_OF_TORCH if cuda <= newest]
    if not fitting:
        return ""
    major, minor = fitting[-1]
    version = torch.__version__.split("+", maxsplit=1)[0]
    index = f"https://download.pytorch.org/whl/cu{major}{minor}"
    return f"pip install --force-reinstall torch=={version} --index-url {index}"


def _words_of_torch() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return first_line(error)
    return "torch says that CUDA is not available, and does not say why"


def _pinned_check(device: str) -> Check:
    """Copies run beside operators only from pinned memory."""

    def try_it() -> str:
        start = time.perf_counter()
        _ops.pinned_memory(_PINNED_BYTES, torch.device(device))
        return f"{human_bytes(_PINNED_BYTES)} in {time.perf_counter() - start:.2f} s"

    hint = "free some RAM. In WSL 2, give it more: memory= in .wslconfig in your Windows folder"
    return tried(f"memory can be pinned for {device}", try_it, hint=hint)


def _kernels_check(device: str) -> Check:
    """Runs them: a LoRA that is added when a weight is fetched, against one that was merged."""
    name = f"the CUDA kernels run on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    command = (
        f"DISTORCH_CUDA=1 DISTORCH_GPUS={major}{minor} pip install --force-reinstall --no-deps ."
    )
    hint = "in distorch's folder; this takes nvcc, the compiler of the CUDA Toolkit"
    if not _native.has_cuda_kernels():
        found = f"{nvidia.kernels()}: quantised weights and LoRAs at a fetch need them"
        return Check(name, "slow", found, command, hint)
    return tried(name, lambda: _lora_at_fetch(device), command, hint)


def _lora_at_fetch(device: str) -> str:
    module = nn.Sequential(nn.Linear(64, 64, bias=False, device=device))
    lora = {"0.lora_A.weight": torch.randn(4, 64), "0.lora_B.weight": torch.randn(64, 4)}
    x = torch.randn(8, 64, device=device)
    distorch.distribute(module, f"{device},0b;cpu,*", min_bytes=0, progress=False)
    results = []
    for mode in ("merge", "fetch"):
        distorch.set_loras(module, [(lora, 1.0)], lora_mode=mode, progress=False)
        results.append(module(x))
    if not torch.equal(*results):
        raise RuntimeError("a LoRA that is added at a fetch gives other bits")
    return f"yes, {nvidia.kernels()}"
