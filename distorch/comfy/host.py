# SPDX-License-Identifier: Apache-2.0
"""The host's devices, and calling its nodes: everything that differs between its versions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import nodes
import torch

from distorch.planner import DeviceInfo
from distorch.runtime import machine
from distorch.runtime.options import compute_device


def devices() -> dict[str, DeviceInfo]:
    """Every device of this machine, RAM and disk included."""
    return machine.devices()


def computing_devices() -> list[str]:
    """Names for a node's choice of where to compute: "cpu" first, as of old."""
    return ["cpu", *sorted(name for name in devices() if name not in ("cpu", "disk"))]


def donor_devices() -> list[str]:
    """Names for a node's choice of a donor."""
    return [*computing_devices(), *(name for name in ("disk",) if name in devices())]


def default_device() -> str:
    """Where the host computes."""
    return compute_device(management.get_torch_device())


def first_choice() -> str:
    """The default of a node's device input: the first accelerator, else the CPU."""
    names = computing_devices()
    return names[1] if len(names) > 1 else names[0]


@contextlib.contextmanager
def computing_on(device: str) -> Iterator[None]:
    """The accelerator that the host finds to be the current one, until the end of the block."""
    target = torch.device(device)
    module = torch.get_device_module(target)
    if target.type == "cpu" or not hasattr(module, "set_device"):
        yield
        return
    before = module.current_device()
    module.set_device(target.index or 0)
    try:
        yield
    finally:
        module.set_device(before)


def node_class(name: str) -> Any:
    """A node of the host or of a pack, by its id; None when it is not there (yet)."""
    return nodes.NODE_CLASS_MAPPINGS.get(name)


def input_types(name: str) -> dict[str, Any]:
    """A fresh copy of a node's inputs, two levels deep."""
    found = node_class(name)
    if found is None:
        return {"required": {}}
    return {part: dict(inputs) for part, inputs in found.INPUT_TYPES().items()}


def call_node(name: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Runs another node and gives its outputs, whichever interface it was written for."""
    found = node_class(name)
    if found is None:
        raise RuntimeError(
            f"the node {name!r} is not installed: install the pack that has it, and start ComfyUI "
            "again"
        )
    if hasattr(found, "define_schema"):
        result = found.execute(**arguments)
    else:
        result = getattr(found(), found.FUNCTION)(**arguments)
    for field in ("result", "args"):
        if not isinstance(result, tuple | list | dict) and getattr(result, field, None) is not None:
            result = getattr(result, field)
    if isinstance(result, dict):
        result = result.get("result", ())
    return tuple(result)


def folder_of_pack(name: str) -> str | None:
    """Where a custom node pack is installed, whatever its folder's spelling; None if it is not."""
    for folder in folder_paths.get_folder_paths("custom_nodes"):
        for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if entry.is_dir() and _plain_name(entry.name) == _plain_name(name):
                return str(entry)
    return None


def _plain_name(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def eject_models() -> None:
    """Takes every model off every device, as the host does when memory is asked for."""
    for device in {loaded.device for loaded in list(management.current_loaded_models)}:
        management.free_memory(1e30, device)
    management.soft_empty_cache()


def is_dynamic(patcher: Any) -> bool:
    """Whether the host would load this model by its dynamic VRAM."""
    asks = getattr(patcher, "is_dynamic", None)
    return bool(asks()) if asks is not None else False


def static_patcher(patcher: Any) -> Any:
    """A patcher on the host's static path around the same kind of model; the same one if it is."""
    return patcher.clone(disable_dynamic=True) if is_dynamic(patcher) else patcher
