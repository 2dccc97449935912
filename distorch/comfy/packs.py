# SPDX-License-Identifier: Apache-2.0
"""Nodes for other packs, made from their classes: the same inputs and outputs, and a device.

A pack's node appears only where that pack is installed. It may load after us, so its class is
looked up when the host asks, not before.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from distorch.comfy import host, loaders, wan
from distorch.errors import SpecError

_DEVICE_TYPE = "MULTIGPUDEVICE"
_SWAP_TIP = (
    "Where all weights of the model live, such as cuda:0,6gb;cpu,*. It wins over the number of "
    "blocks and the swap device. Take the sampler of distorch, too."
)


@dataclass(frozen=True)
class Guest:
    """A node of another pack, with a device.

    `device` our input's name, a choice or (`link`) an output of another node of this kind; it
    stands after their input `after` (None: last). `answers`: inputs of theirs that it decides, each
    with what they are told for the CPU and else. `tells`: the device is one more output.
    """

    source: str
    device: str = "device"
    link: bool = False
    after: str | None = None
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)
    tells: bool = False
    offload: bool = False


_PLACES = {"load_device": ("offload_device", "main_device")}
_KINDS = {"device": ("cpu", "gpu")}
_LOAD = "load_device"

_PULID_FLUX = (
    Guest("PulidFluxModelLoader"), Guest("PulidFluxInsightFaceLoader"),
    Guest("PulidFluxEvaClipLoader"), Guest("ApplyPulidFlux"),
)  # fmt: skip

PACKS: dict[str, tuple[Guest, ...]] = {
    "ComfyUI-LTXVideo": (Guest("LTXVLoader"),),
    "ComfyUI-Florence2": (
        Guest("Florence2ModelLoader", offload=True),
        Guest("DownloadAndLoadFlorence2Model", offload=True),
    ),
    "ComfyUI_bitsandbytes_NF4": (Guest("CheckpointLoaderNF4"),),
    "x-flux-comfyui": (Guest("LoadFluxControlNet"),),
    "ComfyUI-MMAudio": tuple(
        map(Guest, ("MMAudioModelLoader", "MMAudioFeatureUtilsLoader", "MMAudioSampler"))
    ),
    "PuLID_ComfyUI": tuple(
        map(Guest, ("PulidModelLoader", "PulidInsightFaceLoader", "PulidEvaClipLoader"))
    ),
    # What is loaded is moved to a device by the node that applies it.
    "ComfyUI-PuLID-Flux": _PULID_FLUX,
    "ComfyUI-PuLID-Flux-Enhanced": _PULID_FLUX,
    "ComfyUI_PuLID_Flux_ll": _PULID_FLUX,
    "ComfyUI-PuLID-Flux2": tuple(
        map(Guest, ("PuLIDModelLoader", "PuLIDEVACLIPLoader", "ApplyPuLIDFlux2"))
    ),
    "ComfyUI-WanVideoWrapper": (
        Guest("WanVideoModelLoader", "compute_device", after=_LOAD, tells=True),
        Guest("WanVideoSampler", "compute_device", link=True, after="model"),
        Guest("WanVideoBlockSwap", "swap_device"),
        Guest("WanVideoTextEncode", _LOAD, link=True, after="t5", answers=_KINDS),
        Guest("WanVideoTextEncodeSingle", _LOAD, link=True, after="t5", answers=_KINDS),
        Guest("WanVideoTextEncodeCached", _LOAD, after="use_disk_cache", answers=_KINDS),
        Guest("LoadWanVideoT5TextEncoder", after="precision", answers=_PLACES, tells=True),
        Guest("LoadWanVideoClipTextEncoder", after="precision", answers=_PLACES, tells=True),
        Guest("WanVideoVAELoader", _LOAD, after="model_name", tells=True),
        Guest("WanVideoTinyVAELoader", _LOAD, after="model_name", tells=True),
        Guest("WanVideoImageToVideoEncode", _LOAD, link=True, after="vae"),
        Guest("WanVideoDecode", _LOAD, link=True, after="vae"),
        Guest("WanVideoVACEEncode", _LOAD, link=True, after="vae"),
        Guest("WanVideoEncode", _LOAD, link=True, after="vae"),
        Guest("WanVideoClipVisionEncode", _LOAD, link=True, after="clip_vision"),
        Guest("WanVideoControlnetLoader", after=_LOAD),
        Guest("FantasyTalkingModelLoader", after="base_precision"),
        Guest("Wav2VecModelLoader", after=_LOAD),
        Guest("DownloadAndLoadWav2VecModel", after=_LOAD),
        Guest("WanVideoUni3C_ControlnetLoader", after=_LOAD),
    ),
}


class _Theirs:
    """A class attribute that is read from their class each time, with ours after it."""

    def __init__(self, name: str, extra: tuple[str, ...]) -> None:
        self._name, self._extra = name, extra

    def __get__(self, instance: Any, owner: Any) -> tuple[Any, ...]:
        theirs = host.node_class(owner.guest.source)
        found = getattr(theirs, self._name, None) or getattr(theirs, "RETURN_TYPES", None) or ()
        return (*found, *self._extra)


class _GuestNode:
    guest: Guest
    FUNCTION, CATEGORY = "run", "distorch/other packs"

    _theirs: Any = None  # the object of their node, from the first run on

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs, guest = host.input_types(cls.guest.source), cls.guest
        for part in inputs.values():
            for name in guest.answers:
                part.pop(name, None)
        choice = (_DEVICE_TYPE,) if guest.link else loaders.device_input()
        section = next((p for p, names in inputs.items() if guest.after in names), "optional")
        inputs[section] = _inserted(
            inputs.setdefault(section, {}), guest.after, {guest.device: choice}
        )
        if guest.offload:
            inputs[section]["offload_device"] = (host.computing_devices(), {"default": "cpu"})
        return inputs

    def run(self, **arguments: Any) -> tuple[Any, ...]:
        """Their node's outputs, computed on the device."""
        guest = self.guest
        device = str(arguments.pop(guest.device, None) or host.default_device())
        offload = arguments.pop("offload_device", None) if guest.offload else None
        for name, (on_cpu, otherwise) in guest.answers.items():
            arguments[name] = on_cpu if device == "cpu" else otherwise
        with working_on(guest.source, device, offload):
            if self._theirs is None:
                self._theirs = host.new_node(guest.source)
            call = functools.partial(host.call_node, guest.source, node=self._theirs)
            if guest.source == "WanVideoSampler":
                found = wan.sampled(call, arguments, device)
            else:
                found = call(arguments)
        return (*found, device) if guest.tells else tuple(found)


class _BlockSwapNode(_GuestNode):
    """Their block swap, onto a device or by a spec. Their node's output is its inputs."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = super().INPUT_TYPES()
        inputs["optional"]["spec"] = ("STRING", {"default": "", "tooltip": _SWAP_TIP})
        return inputs

    @classmethod
    def VALIDATE_INPUTS(cls, spec: Any = "") -> bool | str:
        """Checked before anything runs."""
        return loaders.validated(spec)

    def run(self, **arguments: Any) -> tuple[Any, ...]:
        """What their sampler is told. With a spec all blocks are put aside until it is followed."""
        device = str(arguments.get("swap_device") or host.default_device())
        spec = str(arguments.get("spec") or "")
        problem = loaders.validated(spec)
        if problem is not True:
            raise SpecError(str(problem))
        if spec.strip():
            arguments |= wan.all_aside(host.input_types(self.guest.source))
        return ({**arguments, "swap_device": device, "spec": spec},)


def _inserted(inputs: dict[str, Any], after: str | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new` after that input, or last."""
    if after not in inputs:
        return {**inputs, **new}
    found: dict[str, Any] = {}
    for name, kind in inputs.items():
        found[name] = kind
        if name == after:
            found |= new
    return found


@contextlib.contextmanager
def working_on(source: str, device: str, offload: str | None = None) -> Iterator[None]:
    """Until the end of the block, their node finds this device, also where its pack keeps one.

    Modules of packs remember the devices that they saw when they were imported; those are put back,
    whatever happens.
    """
    wanted = {"device": device, "offload_device": offload}
    before = [
        (module, name, getattr(module, name))
        for module in _modules_of_pack(source)
        for name, value in wanted.items()
        if value is not None and isinstance(getattr(module, name, None), torch.device)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, torch.device(str(wanted[name])))
        with host.computing_on(device):
            yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _modules_of_pack(source: str) -> list[ModuleType]:
    """Modules that are loaded of the package that a node comes from."""
    package = getattr(host.node_class(source), "__module__", "").partition(".")[0]
    return [
        module
        for name, module in list(sys.modules.items())
        if name == package or name.startswith(f"{package}.")
    ]


def nodes() -> Iterator[tuple[str, type[_GuestNode]]]:
    """(id, class) of the nodes for every pack that is installed."""
    for pack, guests in PACKS.items():
        if host.folder_of_pack(pack) is None:
            continue
        for guest in guests:
            extra = (_DEVICE_TYPE,) if guest.tells else ()
            names = (guest.device,) if guest.tells else ()
            fields = {
                "guest": guest,
                "TITLE": f"{guest.source} (MultiGPU)",
                "RETURN_TYPES": _Theirs("RETURN_TYPES", extra),
                "RETURN_NAMES": _Theirs("RETURN_NAMES", names),
            }
            name = f"{guest.source}MultiGPU"
            kind = _BlockSwapNode if guest.source == "WanVideoBlockSwap" else _GuestNode
            yield name, type(name, (kind,), fields)
