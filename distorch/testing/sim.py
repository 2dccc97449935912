# SPDX-License-Identifier: Apache-2.0
"""The simulated accelerator: devices of type `sim`, limited memory, links, a virtual clock.

Importing this module registers the device type with PyTorch, once and for the life of the process
(PyTorch has room for one such type). Times are virtual: exact, repeatable, and unmoved by what
else the machine does.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import backend_registration

from distorch import _native
from distorch.planner import parse_bytes

try:
    from distorch.testing import _sim  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "this build has no simulated accelerator: in a checkout, `make dev` builds it, or "
        "`DISTORCH_SIM=1 pip install .`"
    ) from error

Link = tuple[str, str]

_HOST_LINK = (16e9, 10e-6)  # bytes per second, seconds
_HOST = -1


class Span(NamedTuple):
    """One piece of work: start and end in virtual seconds, the device or link, what it was."""

    start: float
    end: float
    resource: str
    label: str


def _place(name: str) -> int:
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return _HOST
    if kind == "sim" and (index or "0").isdecimal():
        return int(index or 0)
    raise ValueError(f"{name!r}: expected 'cpu' or a simulated device, such as 'sim:0'")


def configure(
    *,
    devices: int = 1,
    memory: str | int = "24gb",
    flops: float = 35e12,
    memory_bandwidth: float = 900e9,
    links: Mapping[Link, tuple[float, float]] | None = None,
    shared: Iterable[Iterable[Link]] = (),
    mode: str = "deferred",
    disk: tuple[float, float] = (3e9, 80e-6),
) -> None:
    """Sets the machine up: `memory` of each device (bytes), `flops` per second and memory
    bandwidth in bytes per second, `links` (from, to) -> (bytes per second, latency in seconds).

    Links with the host that are not named get 16e9 and 10e-6; others do not exist. The links of
    each group in `shared` share the capacity of the fastest one. `mode`: "deferred" runs operators
    when their virtual time comes and poisons what is not there yet, "eager" when they are issued,
    "dry" not at all (shapes, times, memory and races only). `disk`: what reading files takes,
    bytes per second and seconds of latency, two reads at a time. Clocks start at 0.
    """
    if devices < 1:
        raise ValueError(f"devices={devices}: expected 1 or more")
    known: dict[Link, tuple[float, float]] = {}
    for index in range(devices):
        known["cpu", f"sim:{index}"] = known[f"sim:{index}", "cpu"] = _HOST_LINK
    for (start, end), (rate, latency) in (links or {}).items():
        names = [f"sim:{_place(n)}" if _place(n) != _HOST else "cpu" for n in (start, end)]
        known[names[0], names[1]] = rate, latency
    order = list(known)
    groups = [[order.index(link) for link in group] for group in shared]
    flat = [(_place(a), _place(b), rate, latency) for (a, b), (rate, latency) in known.items()]
    _sim.configure(devices, parse_bytes(memory), flops, memory_bandwidth, flat, groups, mode, *disk)


def synchronize() -> None:
    """Waits until all streams of all devices are done."""
    _sim.synchronize()


def now() -> float:
    """Virtual seconds on the host's clock."""
    return float(_sim.now())


def host_work(seconds: float) -> None:
    """The host is busy for so many virtual seconds."""
    _sim.host_work(seconds)


def races() -> list[str]:
    """Accesses to memory that no event or wait ordered, in words; both sides are named."""
    return list(_sim.races())


def timeline() -> list[Span]:
    """Everything that ran, since `configure` or `reset`."""
    return [Span(*span) for span in _sim.timeline()]


def fail(what: str, device: str | None = None, *, nth: int = 1) -> None:
    """Injects a fault: the `nth` "copy" over a link or the `nth` "alloc" (on `device`) from now
    fails, or a "device" is lost for good.
    """
    if what == "copy":
        _sim.fail_copy(nth)
    elif what == "alloc":
        _sim.fail_alloc(nth, _HOST if device is None else _place(device))
    elif what == "device" and device is not None:
        _sim.fail_device(_place(device))
    else:
        raise ValueError(
            f"fail({what!r}, {device!r}): expected 'copy', 'alloc', or 'device' and one"
        )


def slow(link: Link, *, factor: float, start: float = 0.0, end: float = float("inf")) -> None:
    """A link runs at 1 / factor between two virtual times."""
    _sim.slow(_place(link[0]), _place(link[1]), factor, start, end)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """What is issued on this thread's current stream counts as being captured in a graph (it runs
    all the same). Whoever records an event on that stream gets an error, and breaks the capture:
    then this raises RuntimeError at the end of the block, unless another exception leaves it.
    """
    _sim.begin_capture()
    try:
        yield
    except BaseException:
        _sim.end_capture()
        raise
    if not _sim.end_capture():
        raise RuntimeError("sim: somebody recorded an event on a stream that was being captured")


@contextlib.contextmanager
def room(nbytes: int, device: str = "sim:0") -> Iterator[None]:
    """Only so many bytes more can be allocated on a device."""
    capacity, used, _ = _sim.memory(torch.device(device).index)
    _sim.set_limit(torch.device(device).index, used + nbytes)
    try:
        yield
    finally:
        _sim.set_limit(torch.device(device).index, capacity)


def event_counts() -> tuple[int, int]:
    """Events recorded, and waits for events put on streams, since the process began."""
    recorded, waited = _sim.event_counts()
    return int(recorded), int(waited)


def reset() -> None:
    """Clocks at 0; statistics, races and faults forgotten. Tensors stay."""
    _sim.reset()


def pinned_bytes() -> int:
    """Pinned host memory in use, in bytes (whole pages)."""
    return int(_sim.pinned_bytes())


def is_dry() -> bool:
    """Whether the machine runs without values."""
    return bool(_sim.is_dry())


def _device_module() -> types.ModuleType:
    """What PyTorch expects as `torch.sim`."""
    module = types.ModuleType("torch.sim")

    def index_of(device: Any) -> int:
        if device is None:
            return int(torch._C._accelerator_getDeviceIndex())
        return device if isinstance(device, int) else (torch.device(device).index or 0)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        capacity, used, _ = _sim.memory(index_of(device))
        return capacity - used, capacity

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "manual_seed": lambda seed: None,  # random numbers are the CPU's
        "manual_seed_all": lambda seed: None,
        "device_count": _sim.device_count,
        "current_device": torch._C._accelerator_getDeviceIndex,
        "set_device": torch._C._accelerator_setDeviceIndex,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "synchronize": lambda device=None: synchronize(),
        "empty_cache": lambda: None,
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: _sim.memory(index_of(device))[1],
        "max_memory_allocated": lambda device=None: _sim.memory(index_of(device))[2],
        "reset_peak_memory_stats": lambda device=None: _sim.reset_peak(index_of(device)),
        "is_dry": is_dry,
        "can_device_access_peer": lambda device, peer: bool(_sim.has_link(device, peer)),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def _register() -> None:
    configure()
    backend_registration.rename_privateuse1_backend("sim")
    _sim.register_device()
    _native.set_read_clock("sim", _sim.read_clock())
    _native.set_decode_kernel("sim", _sim.decode_kernel())
    _native.set_host_access(_sim.host_access())
    torch._register_device_module("sim", _device_module())  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)


_register()
