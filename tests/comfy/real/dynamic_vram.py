# SPDX-License-Identifier: Apache-2.0
"""A stand-in for comfy-aimdo, the allocator of ComfyUI's dynamic VRAM, on the simulated devices.

comfy-aimdo needs an NVIDIA or AMD driver. This has the functions that ComfyUI calls. Weights get
memory of a simulated device when they are asked for, and lose it to others that matter more. One
thing it does not do: the real one also takes memory from weights when PyTorch allocates.

`take_static_path_away` makes of a host one that knows dynamic patchers only, as was announced once.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import mmap
import os
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import torch

Allocation = tuple[Any, int, int]  # its owner, its address, its bytes
HEADROOM = 24 << 20  # bytes of a device that weights leave to everything else
ALIGNMENT = 512
FAR_APART = 1 << 44  # addresses of two models never meet

_vbars: list[weakref.ref[ModelVBAR]] = []  # the most important one first
_addresses = itertools.count(1)
_signatures = itertools.count(1)


def _free_bytes(device: int) -> int:
    return int(torch.sim.mem_get_info(device)[0])  # type: ignore[attr-defined]


class _Page:
    """The memory of one weight."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory: torch.Tensor | None = None
        self.signature = 0
        self.pinned = False

    def drop(self) -> int:
        if self.memory is None or self.pinned:
            return 0
        # Views of it may be left, as addresses are in the real one: nobody may look at them.
        self.memory.untyped_storage().resize_(0)
        self.memory = None
        return self.nbytes


class ModelVBAR:
    """Room for a model's weights on a device, in the order in which they matter."""

    def __init__(self, size: int, device: int) -> None:
        self.device, self.max_size, self.offset = device, size, 0
        self.base_addr = next(_addresses) * FAR_APART
        self.pages: dict[int, _Page] = {}
        self.watermark = sys.maxsize  # weights from this address on stay away
        _vbars.insert(0, weakref.ref(self, _vbars.remove))

    def prioritize(self, malloc_async_clamp: int | None = None) -> None:
        _vbars.sort(key=lambda found: found() is not self)
        self.watermark = sys.maxsize

    def alloc(self, num_bytes: int) -> Allocation:
        self.offset = -(-self.offset // ALIGNMENT) * ALIGNMENT
        if self.offset + num_bytes > self.max_size:
            raise MemoryError("no room in this VBAR")
        address = self.base_addr + self.offset
        self.offset += num_bytes
        self.pages[address] = _Page(num_bytes)
        return self, address, num_bytes

    def loaded_size(self) -> int:
        return sum(page.nbytes for page in self.pages.values() if page.memory is not None)

    def free_memory(self, size: int) -> int:
        """Drops what matters least."""
        freed = 0
        for address in sorted(self.pages, reverse=True):
            if freed >= size:
                break
            dropped = self.pages[address].drop()
            if dropped:
                freed += dropped
                self.watermark = min(self.watermark, address)
        return freed


def _of_device(device: int) -> list[ModelVBAR]:
    return [found for ref in _vbars if (found := ref()) is not None and found.device == device]


def _make_room(vbar: ModelVBAR, address: int, nbytes: int) -> bool:
    """Takes memory from what matters less than this weight."""
    for victim in reversed(_of_device(vbar.device)):
        for place in sorted(victim.pages, reverse=True):
            if _free_bytes(vbar.device) >= nbytes + HEADROOM:
                return True
            if victim is vbar and place <= address:
                break
            if victim.pages[place].drop():
                victim.watermark = min(victim.watermark, place)
        if victim is vbar:
            break
    return _free_bytes(vbar.device) >= nbytes + HEADROOM


def vbar_fault(allocation: Allocation) -> tuple[int, ...] | None:
    """Memory for a weight, or for all of a block: its signature; None if there is none."""
    vbar, begin, nbytes = allocation
    found = {a: page for a, page in vbar.pages.items() if begin <= a < begin + nbytes}
    for address, page in found.items():
        if page.memory is None:
            if address >= vbar.watermark or not _make_room(vbar, address, page.nbytes):
                return None
            page.memory = torch.empty(
                page.nbytes, dtype=torch.uint8, device=torch.device("sim", vbar.device)
            )
            page.signature = next(_signatures)
        page.pinned = True
    return tuple(page.signature for page in found.values())


def vbar_unpin(allocation: Allocation | None) -> None:
    if allocation is not None:
        vbar, begin, nbytes = allocation
        for address, page in vbar.pages.items():
            if begin <= address < begin + nbytes:
                page.pinned = False


def vbar_signature_compare(one: Any, other: Any) -> bool:
    return one is not None and one == other


def vbars_reset_watermark_limits() -> None:
    """Nothing sets a limit here."""


def vbars_analyze(device: int | None = None) -> int:
    """Bytes that could be taken from weights."""
    return sum(vbar.loaded_size() for vbar in _of_device(device or 0))


class VRAMBuffer:
    """Device memory that grows."""

    def __init__(self, max_size: int, device: int) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=torch.device("sim", device))

    def size(self) -> int:
        return self.memory.numel()

    def get(self, size: int, offset: int = 0) -> Allocation:
        if size + offset > self.memory.numel():
            self.memory = torch.empty(size + offset, dtype=torch.uint8, device=self.memory.device)
        return self, offset, size


def aimdo_to_tensor(allocation: Allocation, device: torch.device) -> torch.Tensor:
    owner, address, nbytes = allocation
    if isinstance(owner, VRAMBuffer):
        return owner.memory[address : address + nbytes]
    memory = owner.pages[address].memory
    assert memory is not None, "a weight that has no memory was asked for"
    return memory[:nbytes]


class HostBuffer:
    """Host memory that grows in place."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True):
        self.size = size
        self.memory = mmap.mmap(-1, max(size, max_grow_size, 1))

    def get_raw_address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + size > len(self.memory):
            raise RuntimeError("no room in this HostBuffer")
        self.size += size
        return self.get_raw_address()

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = size


def hostbuf_to_tensor(buffer: HostBuffer) -> torch.Tensor:
    return torch.frombuffer(buffer.memory, dtype=torch.uint8, count=buffer.size)


class ModelMMAP:
    """A file in memory, read-only."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with Path(path).open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def get(self) -> int:
        return self.address

    def get_file_handle(self) -> None:
        """None: ComfyUI then copies from the mapping, and reads no file onto a device by itself."""

    def bounce(self) -> bool:
        return True


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _yes(*_: Any, **__: Any) -> bool:
    return True


_PARTS: dict[str, dict[str, Any]] = {
    "control": {
        "lib": True, "devctxs": [], "init": _yes, "init_devices": _yes, "init_device": _yes,
        "deinit": _nothing, "analyze": _nothing, "get_total_vram_usage": lambda: 0,
        **{
            f"set_log_{level}": _nothing
            for level in ("none", "critical", "error", "warning", "info", "detail", "debug")
        },
    },
    "model_vbar": {
        "ModelVBAR": ModelVBAR, "vbar_fault": vbar_fault, "vbar_unpin": vbar_unpin,
        "vbar_signature_compare": vbar_signature_compare, "vbars_analyze": vbars_analyze,
        "vbars_reset_watermark_limits": vbars_reset_watermark_limits,
    },
    "torch": {
        "aimdo_to_tensor": aimdo_to_tensor, "hostbuf_to_tensor": hostbuf_to_tensor,
        "get_torch_allocator": lambda: None,
    },
    "host_buffer": {
        "HostBuffer": HostBuffer, "read_file_to_device": _nothing,
        "cleanup_file_reader": _nothing,
    },
    "vram_buffer": {"VRAMBuffer": VRAMBuffer},
    "model_mmap": {"ModelMMAP": ModelMMAP},
}  # fmt: skip


def install() -> None:
    """Takes the place of comfy_aimdo in this process, before ComfyUI imports it."""
    package = types.ModuleType("comfy_aimdo")
    package.__path__ = []
    sys.modules["comfy_aimdo"] = package
    for name, contents in _PARTS.items():
        part = types.ModuleType(f"comfy_aimdo.{name}")
        vars(part).update(contents)
        sys.modules[part.__name__] = part
        setattr(package, name, part)


class _Runtime:
    """What ComfyUI calls of the CUDA runtime to pin memory that is there already: 0 is success."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


def allow_pins(management: Any, nbytes: int) -> None:
    """The host may pin so many bytes. 0: none, as where no driver is."""
    if nbytes > 0:
        management.MAX_PINNED_MEMORY = nbytes
        torch.cuda.cudart = _Runtime  # type: ignore[assignment]


# Functions that read a model again from its file, whose `disable_dynamic` asks for the static path.
_LOADERS = (
    "load_diffusion_model", "load_clip_model_patcher", "load_vae_patcher",
    "load_checkpoint_guess_config",
    "load_checkpoint_guess_config_model_only", "load_checkpoint_guess_config_clip_only",
    "load_checkpoint_clip_patcher", "load_checkpoint_vae_patcher",
)  # fmt: skip


def take_static_path_away(how: str) -> None:
    """`how`: "unknown" (the host has no parameter for it) or "ignored" (it takes no notice)."""
    from comfy import model_patcher, sd

    owners = [(sd, name) for name in _LOADERS if hasattr(sd, name)]
    for owner, name in (*owners, (model_patcher.ModelPatcherDynamic, "clone")):
        setattr(owner, name, _always_dynamic(getattr(owner, name), how))


def _always_dynamic(function: Any, how: str) -> Any:
    known = inspect.signature(function)
    left = [found for name, found in known.parameters.items() if name != "disable_dynamic"]

    @functools.wraps(function)
    def changed(*args: Any, **options: Any) -> Any:
        if options.pop("disable_dynamic", False) and how == "unknown":
            raise TypeError(f"{function.__name__}() has no parameter 'disable_dynamic'")
        return function(*args, **options)

    if how == "unknown":
        changed.__signature__ = known.replace(parameters=left)  # type: ignore[attr-defined]
    return changed
