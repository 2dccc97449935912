# SPDX-License-Identifier: Apache-2.0
"""Whether the device still answers, from a fresh process: `health cuda|sim [--count]`.

CUDA is asked through its driver, without torch: a check must take seconds, and torch takes some to
be imported.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_COUNT = 1024  # numbers that are written and read back


class Driver:
    """libcuda, whose errors are raised in its words."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"the driver's library does not load: {error}") from None
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()} ({status})")

    def count(self) -> int:
        found = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(found))
        return found.value


def driver_for() -> str:
    """The newest CUDA that the driver knows."""
    found = ctypes.c_int()
    Driver().call("cuDriverGetVersion", ctypes.byref(found))
    return f"{found.value // 1000}.{found.value % 1000 // 10}"


def cuda() -> dict[str, Any]:
    """Memory of the first device is filled, and read back."""
    driver = Driver()
    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    driver.call("cuDeviceGet", ctypes.byref(device), 0)
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    driver.call("cuCtxSetCurrent", context)
    driver.call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(4 * _COUNT))
    driver.call("cuMemsetD32_v2", memory, ctypes.c_uint(42), ctypes.c_size_t(_COUNT))
    read = (ctypes.c_uint * _COUNT)()
    driver.call("cuMemcpyDtoH_v2", read, memory, ctypes.c_size_t(4 * _COUNT))
    if set(read) != {42}:
        raise RuntimeError("the device gave back other numbers than were written")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return {"answers": True, "free": free.value, "total": total.value}


def sim() -> dict[str, Any]:
    import torch

    from distorch.testing import sim as simulated

    simulated.configure()
    found = (torch.ones(_COUNT).to("sim:0") + 41).cpu()
    if not torch.equal(found, torch.full((_COUNT,), 42.0)):
        raise RuntimeError("the device gave back other numbers than were written")
    return {"answers": True}


def main(arguments: list[str]) -> int:
    try:
        if "--count" in arguments:
            found: dict[str, Any] = {"count": Driver().count()}
        else:
            found = {"cuda": cuda, "sim": sim}[arguments[0]]()
    except Exception as error:
        print(json.dumps({"answers": False, "error": f"{error}"}))
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
