# SPDX-License-Identifier: Apache-2.0
"""ComfyUI on the simulated accelerator: two devices of little memory, links, no GPU.

usage: serve_sim.py COMFYUI_DIR [arguments of main.py]     DISTORCH_SIM_MEMORY=bytes of each device

The host learns of its devices here, in the test's process; nothing of this is in the node pack.
With `--enable-dynamic-vram` the host manages the memory of its own models by dynamic VRAM, and with
DISTORCH_TEST_STATIC_PATH="unknown" or "ignored" it has nothing else. DISTORCH_TEST_PINNED is how many
bytes it may pin.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import dynamic_vram
import sim_autocast
import torch
from serve import prepare

from distorch.testing import sim

MEMORY = int(os.environ.get("DISTORCH_SIM_MEMORY", str(8 << 30)))


def teach(management: Any) -> None:
    """Makes the host see sim:0 and sim:1."""
    devices = [torch.device("sim", index) for index in range(2)]

    def memory(device: Any) -> tuple[int, int]:
        found = device or devices[0]
        if found.type == "cpu":
            return 16 << 30, 16 << 30
        free, total = torch.sim.mem_get_info(found.index or 0)  # type: ignore[attr-defined]
        return int(free), int(total)

    def free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        free, _ = memory(dev)
        return (free, 0) if torch_free_too else free

    def total_memory(dev: Any = None, torch_total_too: bool = False) -> Any:
        _, total = memory(dev)
        return (total, 0) if torch_total_too else total

    management.cpu_state = management.CPUState.GPU
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.get_torch_device = lambda: devices[torch.sim.current_device()]  # type: ignore[attr-defined]
    management.get_all_torch_devices = lambda *_, **__: list(devices)
    management.get_free_memory = free_memory
    management.get_total_memory = total_memory
    management.soft_empty_cache = lambda *_, **__: None
    management.minimum_inference_memory = lambda: 16 << 20
    management.extra_reserved_memory = lambda: 4 << 20


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    kept = prepare(folder), sim_autocast.install()
    os.chdir(folder)
    links = {("sim:0", "sim:1"): (20e9, 1e-5), ("sim:1", "sim:0"): (20e9, 1e-5)}
    sim.configure(devices=2, memory=MEMORY, links=links, mode="eager")
    if "--enable-dynamic-vram" in sys.argv:
        dynamic_vram.install()
    sys.argv = [str(folder / "main.py"), *sys.argv[2:], "--force-fp32"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management

    teach(comfy.model_management)
    dynamic_vram.allow_pins(
        comfy.model_management, int(os.environ.get("DISTORCH_TEST_PINNED", "0"))
    )
    if "DISTORCH_TEST_STATIC_PATH" in os.environ:
        dynamic_vram.take_static_path_away(os.environ["DISTORCH_TEST_STATIC_PATH"])
    runpy.run_path(sys.argv[0], run_name="__main__")
