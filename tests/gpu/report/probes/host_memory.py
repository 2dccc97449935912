# SPDX-License-Identifier: Apache-2.0
"""Pinned memory: where it lies, what it costs, and who waits when it is freed."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distorch import _ops

from .cudart import PORTABLE, Runtime, said

MB = 1 << 20
_PAGE = 4096


def addresses(device: torch.device) -> dict[str, Any]:
    """Addresses modulo a page: unbuffered reads want them aligned."""
    sizes = (1, 4096, 12345, MB, 3 * MB + 5, 64 * MB)

    def modulo(make: Callable[[int], torch.Tensor]) -> dict[str, Any]:
        kept = []  # so that each has an address of its own

        def one(nbytes: int) -> int:
            kept.append(make(nbytes))
            return kept[-1].data_ptr() % _PAGE

        return {str(nbytes): said(lambda nbytes=nbytes: one(nbytes)) for nbytes in sizes}

    return {
        "torch's, modulo 4096": modulo(
            lambda nbytes: torch.empty(nbytes, dtype=torch.uint8).pin_memory()
        ),
        "distorch's, modulo 4096": modulo(lambda nbytes: _ops.pinned_memory(nbytes, device)),
    }


def direct_reads(device: torch.device) -> dict[str, Any]:
    """preadv on a file opened with O_DIRECT, into pinned memory at several offsets."""
    wanted = os.urandom(MB)
    folder = _on_a_disk()
    system = {"file system": _file_system(folder)}
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(wanted)
        file.flush()
        os.fsync(file.fileno())
        try:
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            return {**system, "open": errno.errorcode.get(error.errno or 0, str(error))}
        try:
            return system | _direct_reads(descriptor, wanted, device)
        finally:
            os.close(descriptor)


def _on_a_disk() -> Path:
    """Where weights would be. The items' own folder may be in memory, as /tmp often is."""
    wanted = [os.environ.get("DISTORCH_DISK"), os.environ.get("DISTORCH_REPORT_TREE"), "/var/tmp"]
    known = [Path(folder) for folder in wanted if folder and os.access(folder, os.W_OK)]
    return next((folder for folder in known if _file_system(folder) != "tmpfs"), Path.cwd())


def _file_system(folder: Path) -> str:
    """The name of the one that is mounted there last and deepest."""
    found, depth = "not told", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        there = Path(point.replace("\\040", " "))
        if folder.resolve().is_relative_to(there) and len(there.parts) >= depth:
            found, depth = kind, len(there.parts)
    return found


def _direct_reads(descriptor: int, wanted: bytes, device: torch.device) -> dict[str, Any]:
    memory = {
        "torch's": torch.zeros(2 * MB, dtype=torch.uint8).pin_memory(),
        "distorch's": _ops.pinned_memory(2 * MB, device),
    }
    found: dict[str, Any] = {}
    for name, tensor in memory.items():
        aligned = -tensor.data_ptr() % _PAGE
        for shift in (0, 512, 4):
            part = tensor[aligned + shift :][:MB]
            found[f"{name}, {shift} bytes off a page"] = _read(descriptor, part, wanted)
    return found


def _read(descriptor: int, into: torch.Tensor, wanted: bytes) -> str:
    try:
        count = os.preadv(descriptor, [memoryview(into.numpy())], 0)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    right = into[:count].numpy().tobytes() == wanted[:count]
    return f"read {count} bytes, {'right' if right else 'WRONG'}"


def freeing(device: torch.device) -> dict[str, Any]:
    """Memory is freed while copies from it are queued. Does the call wait, are the bytes right?"""
    runtime, nbytes, copies = Runtime(), 64 * MB, 64
    source = runtime.host_alloc(nbytes)
    ctypes.memset(source, 1, nbytes)
    target = torch.zeros(copies // 16, nbytes, dtype=torch.uint8, device=device)
    stream = runtime.stream()
    rows = [target[i % len(target)].data_ptr() for i in range(copies)]
    torch.cuda.synchronize()

    def queue() -> float:
        start = time.perf_counter()
        for row in rows:
            runtime.copy(row, source, nbytes, stream)
        return time.perf_counter() - start

    def wait() -> None:
        runtime.call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    start = time.perf_counter()
    queue()
    wait()
    whole = time.perf_counter() - start
    queued = queue()
    start = time.perf_counter()
    runtime.host_free(source)
    freed = time.perf_counter() - start
    again = runtime.host_alloc(nbytes)
    ctypes.memset(again, 2, nbytes)
    wait()
    right = bool((target == 1).all().item())
    return {
        "copies_s": whole, "queueing_s": queued, "freeing_s": freed,
        "freeing waits for copies": freed > (whole - queued) / 2,
        "memory came at the same address again": again == source, "copied bytes are right": right,
    }  # fmt: skip


def pinning(_: torch.device) -> dict[str, Any]:
    """Bytes per second of getting pinned memory, and of giving it back.

    In pieces as large as weights are, and in slabs: whether it pays for weights to share slabs.
    """
    runtime = Runtime()
    found = {
        f"cudaHostAlloc, {count} x {nbytes // MB} MiB": said(
            lambda nbytes=nbytes, count=count: _alloc(runtime, nbytes, count)
        )
        for nbytes, count in (
            (MB, 64), (4 * MB, 16), (32 * MB, 8), (64 * MB, 4), (256 * MB, 1), (1024 * MB, 1),
        )
    }  # fmt: skip
    found["cudaHostAlloc of 256 MiB in each of 4 threads"] = said(lambda: _in_threads(runtime, 4))
    found["1 GiB mapped in large pages, touched by all cores, registered"] = said(
        lambda: _registered(runtime, 1024 * MB)
    )
    return found


def _alloc(runtime: Runtime, nbytes: int, count: int) -> dict[str, float]:
    start = time.perf_counter()
    addresses = [runtime.host_alloc(nbytes) for _ in range(count)]
    middle = time.perf_counter()
    for address in addresses:
        runtime.host_free(address)
    end = time.perf_counter()
    return {"pinning, bytes_per_s": count * nbytes / (middle - start),
            "freeing, bytes_per_s": count * nbytes / (end - middle)}  # fmt: skip


def _in_threads(runtime: Runtime, count: int) -> dict[str, float]:
    nbytes = 256 * MB
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        start = time.perf_counter()
        found = list(threads.map(runtime.host_alloc, [nbytes] * count))
        middle = time.perf_counter()
        list(threads.map(runtime.host_free, found))
        end = time.perf_counter()
    return {"pinning, bytes_per_s": count * nbytes / (middle - start),
            "freeing, bytes_per_s": count * nbytes / (end - middle)}  # fmt: skip


def _registered(runtime: Runtime, nbytes: int) -> dict[str, float]:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    start = time.perf_counter()
    view.fill_(1)
    touched = time.perf_counter()
    pointer = ctypes.c_void_p(view.data_ptr())
    runtime.call("cudaHostRegister", pointer, ctypes.c_size_t(nbytes), PORTABLE)
    registered = time.perf_counter()
    runtime.call("cudaHostUnregister", pointer)
    end = time.perf_counter()
    return {
        "touching, bytes_per_s": nbytes / (touched - start),
        "registering, bytes_per_s": nbytes / (registered - touched),
        "both, bytes_per_s": nbytes / (registered - start),
        "unregistering, bytes_per_s": nbytes / (end - registered),
    }
