# SPDX-License-Identifier: Apache-2.0
"""The host's devices, nodes, memory and web page: everything that differs between its versions."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import nodes
import torch
from comfy import model_patcher

from distorch.machine import machine
from distorch.planner import DeviceInfo
from distorch.runtime.options import compute_device

_log = logging.getLogger("distorch")


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


def device_names() -> str:
    """What the accelerators are called, for people who choose one: "cuda:0 NVIDIA ..., 24.0 GB"."""
    found = []
    for name, info in devices().items():
        if name in ("cpu", "disk"):
            continue
        asks = getattr(torch.get_device_module(name.partition(":")[0]), "get_device_name", None)
        title = f" {asks(name)}" if asks is not None else ""
        found.append(f"{name}{title}, {info.total_bytes / 2**30:.1f} GB")
    return "; ".join(found)


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


def new_node(name: str) -> Any:
    """An object of another node, for `call_node`. None if nodes of its kind have none."""
    found = node_class(name)
    return None if found is None or hasattr(found, "define_schema") else found()


def call_node(name: str, arguments: Mapping[str, Any], node: Any = None) -> tuple[Any, ...]:
    """Runs another node and gives its outputs, whichever interface it was written for.

    `node` is its object if one is to be used for several runs. The host keeps a node's object as
    long as the node is in the workflow, and what some nodes have done ends with their object.
    """
    found = node_class(name)
    if found is None:
        raise RuntimeError(
            f"the node {name!r} is not installed: install the pack that has it, and start ComfyUI "
            "again"
        )
    if hasattr(found, "define_schema"):
        result = found.execute(**arguments)
    else:
        result = getattr(found() if node is None else node, found.FUNCTION)(**arguments)
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


# --- dynamic VRAM ---


def is_dynamic(patcher: Any) -> bool:
    """Whether the host loads this model by its dynamic VRAM."""
    asks = getattr(patcher, "is_dynamic", None)
    return bool(asks()) if asks is not None else False


def is_hosts_own(patcher: Any) -> bool:
    """Whether this is a patcher of the host itself, and not of a pack."""
    return type(patcher).__module__ == model_patcher.__name__


def dynamic_vram() -> bool:
    """Whether the host manages the memory of its own models by dynamic VRAM."""
    try:
        import comfy.memory_management as memory
    except ImportError:  # an older host
        return False
    return bool(getattr(memory, "aimdo_enabled", False))


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function of the host has a parameter of this name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def reloaded(factory: tuple[Any, ...]) -> Any:
    """A fresh patcher from the same file, on the static path if the host has one.

    `factory` is what the host keeps for that: a function, its arguments, and which of its outputs.
    """
    make, arguments, *rest = factory
    options = {"disable_dynamic": True} if takes(make, "disable_dynamic") else {}
    found = make(*arguments, **options)
    return found[rest[0]] if rest else found


def static_patcher(patcher: Any) -> Any:
    """A patcher on the host's static path around the same kind of model.

    The same one if it is on it already. Still a dynamic one if the host has no static path: then
    it does not know `disable_dynamic`, or it takes no notice of it.
    """
    if not is_dynamic(patcher):
        return patcher
    factory = getattr(patcher, "cached_patcher_init", None)
    if not takes(patcher.clone, "disable_dynamic"):
        return patcher
    if factory is None:  # nothing to read it from, so it takes this model
        return patcher.clone(disable_dynamic=True, model_override=(patcher.model, _nothing()))
    if not takes(factory[0], "disable_dynamic"):
        return patcher
    return patcher.clone(disable_dynamic=True)


def cpu_patcher(patcher: Any) -> Any:
    """A patcher whose model computes on the CPU. There the host has static ones only."""
    made = static_patcher(patcher)
    made.load_device = torch.device("cpu")
    return made.clone() if is_dynamic(made) else made


def _nothing() -> tuple[Any, ...]:
    """What a clone shares with others of its model, of a model that nobody has patched yet: kept
    weights, kept buffers, kept objects, and what is pinned.
    """
    return {}, {}, {}, set()


def clone_around(patcher: Any, model: torch.nn.Module) -> Any:
    """A clone of a patcher around another model of the same kind. Nothing is loaded or patched yet.

    It is on the static path if the host has one.
    """
    options: dict[str, Any] = {}
    if is_dynamic(patcher):
        options["model_override"] = (model, _nothing())
        if takes(patcher.clone, "disable_dynamic"):
            options["disable_dynamic"] = True
    clone = patcher.clone(**options)
    clone.model = model
    clone.backup, clone.object_patches_backup, clone.hook_backup = {}, {}, {}
    clone.pinned, clone.cached_hook_patches, clone.is_injected = set(), {}, False
    if hasattr(clone, "backup_buffers"):
        clone.backup_buffers = {}
    for name in ("model_loaded_weight_memory", "lowvram_patch_counter"):
        setattr(model, name, 0)
    vars(model)["current_weight_patches_uuid"] = None
    return clone


# --- room ---

Listed = Sequence["weakref.ref[Any]"]  # entries of the host's list of loaded models


def listed() -> Listed:
    """The models that the host has loaded, as it lists them now."""
    return [weakref.ref(loaded) for loaded in management.current_loaded_models]


def joined_since(before: Listed) -> list[Any]:
    """Entries that are on the host's list and were not on it before."""
    known = [ref() for ref in before]
    return [
        loaded
        for loaded in management.current_loaded_models
        if not any(loaded is one for one in known)
    ]


def with_freed(
    known: Mapping[str, DeviceInfo], model: torch.nn.Module, keep: Sequence[Any] = ()
) -> dict[str, DeviceInfo]:
    """The same devices, as if the host had taken all models but this one off accelerators, and but
    those in `keep`.

    Models of ours say what they hold on each device (`held`). The ring, which they share, is not
    counted.
    """
    found = dict(known)
    for loaded in list(management.current_loaded_models):
        patcher = loaded.model
        if patcher is None or patcher.model is model or any(loaded is one for one in keep):
            continue
        held = getattr(patcher, "held", None)
        bytes_there = held() if held else {str(loaded.device): int(patcher.loaded_size())}
        for name, nbytes in bytes_there.items():
            if name in found and name not in ("cpu", "disk"):
                device = found[name]
                free = min(device.total_bytes, device.free_bytes + nbytes)
                found[name] = replace(device, free_bytes=free)
    return found


def make_room(nbytes: int, device: torch.device, keep: Sequence[Any]) -> None:
    """Frees so much of a device, but leaves some of the models that are loaded (`keep`).

    First what computes there, as the host does. Then models of ours that keep weights there.
    """
    if device.type == "cpu":
        return
    management.free_memory(nbytes, device, list(keep))
    for loaded in list(management.current_loaded_models):
        if management.get_free_memory(device) >= nbytes:
            break
        held = getattr(loaded.model, "held", None)
        if held and held().get(str(device), 0) and not any(loaded is one for one in keep):
            others = [one for one in management.current_loaded_models if one is not loaded]
            management.free_memory(1e30, loaded.device, others)


def inference_memory() -> int:
    """Bytes that the host leaves for running a model."""
    return int(management.minimum_inference_memory())


def sampling_memory(kind: str, config: Mapping[str, Any], latent: Sequence[int]) -> int | None:
    """Bytes that the host expects sampling to take beside the weights, by its own formula.

    `kind` is a class of `comfy.supported_models`, `latent` the shape of what is sampled: twice, for
    the positive and the negative text. None if this version does not know the kind.
    """
    try:
        from comfy import model_base, supported_models

        family = getattr(supported_models, kind)(dict(config))
        # The formula is a method of models. It looks at these fields of them.
        model = types.SimpleNamespace(
            memory_usage_factor=family.memory_usage_factor,
            memory_usage_factor_conds=(), memory_usage_shape_process={}, manual_cast_dtype=None,
            get_dtype=lambda: torch.bfloat16, get_dtype_inference=lambda: torch.bfloat16,
        )  # fmt: skip
        shape = [2 * latent[0], *latent[1:]]
        needed = int(model_base.BaseModel.memory_required(model, shape))
    except Exception:  # whatever its code does with these in another version
        _log.debug("no presets for %s", kind, exc_info=True)
        return None
    extra = getattr(management, "extra_reserved_memory", lambda: 0)
    return max(inference_memory(), needed + int(extra()))


def free_for_weights(device: torch.device) -> int:
    """Bytes of a device that weights may take."""
    return int(management.get_free_memory(device)) - inference_memory()


def let_go(patcher: Any) -> None:
    """Takes a patcher's model off its device, and the patcher off the host's list.

    The list says on which device a model is loaded, whatever the patcher says later.
    """
    for loaded in list(management.current_loaded_models):
        if loaded.model is not patcher:
            continue
        management.current_loaded_models.remove(loaded)
        patcher.detach()
        if getattr(loaded, "model_finalizer", None) is not None:
            loaded.model_finalizer.detach()


def make_room_for_pins(nbytes: int, pinned: int) -> bool:
    """Asks the host to give up pinned memory of its own for so many bytes of ours.

    `pinned` is how many bytes models of ours have pinned: the host does not count them. False if
    it has less for us. An older host has no such budget.
    """
    if nbytes <= 0 or not hasattr(management, "ensure_pin_registerable"):
        return True
    if management.MAX_PINNED_MEMORY <= 0:  # it pins nothing itself
        return True
    enough = bool(management.ensure_pin_budget(nbytes))  # of the memory that is free now
    return bool(management.ensure_pin_registerable(nbytes + pinned)) and enough


# --- the web page ---


def _server() -> Any:
    """The host's server; None if there is none."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def page_waits() -> bool:
    """Whether a web page waits for the prompt that runs. Prompts of programs have none."""
    return getattr(_server(), "client_id", None) is not None


def node_now() -> str | None:
    """The number of the node that runs, as the web page has it. None if the host does not say."""
    try:
        from comfy_execution.utils import get_executing_context

        return str(get_executing_context().node_id)
    except (ImportError, AttributeError):  # an older version, or outside of a prompt
        return None


def tell_page(event: str, data: Mapping[str, Any]) -> None:
    """Sends an event to the web page that waits. Any thread may call it."""
    server = _server()
    server.send_sync(event, dict(data), server.client_id)
