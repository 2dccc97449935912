# SPDX-License-Identifier: Apache-2.0
"""Loader nodes under the old pack's names, made from the host's loaders and a table.

Each takes the host's node of the same kind, adds inputs after its own, in the old order, so that
saved workflows load and run as they are, and puts every output where the inputs say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distorch.comfy import host, outputs
from distorch.comfy.placement import old_placement, spec_problem
from distorch.errors import PlacementError

DEVICE, COMPUTE = "device", "compute_device"
LEGACY_MOST_GB, MOST_GB = 24.0, 128.0


@dataclass(frozen=True)
class Family:
    """A loader of the host: `device_input` our name for where it computes in DisTorch2 nodes,
    `eject` the default of eject_models, `own_device` if the host's node has an input "device".
    """

    source: str
    device_input: str = COMPUTE
    eject: bool = True
    own_device: bool = False


CORE = (
    Family("UNETLoader"),
    Family("VAELoader"),
    Family("CLIPLoader", DEVICE, eject=False, own_device=True),
    Family("DualCLIPLoader", DEVICE, eject=False, own_device=True),
    Family("TripleCLIPLoader", DEVICE, eject=False),
    Family("QuadrupleCLIPLoader", DEVICE, eject=False),
    Family("CLIPVisionLoader", DEVICE, eject=False),
    Family("CheckpointLoaderSimple"),
    Family("ControlNetLoader"),
    Family("DiffusersLoader"),
    Family("DiffControlNetLoader"),
    # The old pack had no nodes for these.
    Family("ImageOnlyCheckpointLoader"),
    Family("unCLIPCheckpointLoader"),
    Family("LTXAVTextEncoderLoader", DEVICE, eject=False, own_device=True),
    Family("LTXVAudioVAELoader"),
    Family("AudioEncoderLoader", DEVICE, eject=False),
    Family("LatentUpscaleModelLoader"),
    Family("FrameInterpolationModelLoader"),
    Family("ModelPatchLoader"),
)


def _choices(names: list[str], default: str, tip: str) -> tuple[Any, ...]:
    found = host.device_names()
    return names, {"default": default, "tooltip": f"{tip} {found}." if found else tip}


def device_input() -> tuple[Any, ...]:
    """Where to compute."""
    return _choices(host.computing_devices(), host.first_choice(), "Where the model computes.")


def donor_input() -> tuple[Any, ...]:
    """Who keeps the weights."""
    return _choices(host.donor_devices(), "cpu", "Who keeps the weights that leave it.")


def virtual_vram_input(most: float = MOST_GB, default: float = 4.0) -> tuple[Any, ...]:
    """GB (2^30 bytes) that the compute device gives away."""
    tip = "GB of weights that leave the compute device for the donor. 0: all stay."
    return "FLOAT", {"default": default, "min": 0.0, "max": most, "step": 0.1, "tooltip": tip}


def expert_input() -> tuple[Any, ...]:
    """A placement string."""
    tip = "A placement such as cuda:0,2.5gb;cpu,* or cuda:0,25%;cpu,75%. It wins over virtual VRAM."
    return "STRING", {"multiline": False, "default": "", "tooltip": tip}


def boolean_input(default: bool, tip: str) -> tuple[Any, ...]:
    """A switch."""
    return "BOOLEAN", {"default": default, "tooltip": tip}


def distorch2_inputs(device: str, eject: bool) -> dict[str, Any]:
    """The inputs of DisTorch2 loaders, in their order."""
    return {
        device: device_input(),
        "virtual_vram_gb": virtual_vram_input(),
        "donor_device": donor_input(),
        "expert_mode_allocations": expert_input(),
        "eject_models": boolean_input(eject, EJECT_TIP),
    }


def legacy_inputs() -> dict[str, Any]:
    """The inputs of the first version's loaders, in their order."""
    return {
        DEVICE: device_input(),
        "virtual_vram_gb": virtual_vram_input(LEGACY_MOST_GB),
        "use_other_vram": boolean_input(False, "Donors are the other accelerators, then RAM."),
        "expert_mode_allocations": expert_input(),
    }


EJECT_TIP = "Take all other models off their devices before this one is loaded."


class _FromHost:
    """What node classes made here share. `family` and `outputs` come from the table."""

    family: Family
    TITLE: str
    FUNCTION = "load"
    DESCRIPTION = "Weights live on donors and arrive just in time; the results are the same bits."

    @classmethod
    def host_inputs(cls) -> dict[str, Any]:
        """The inputs of the host's loader, with room for ours."""
        inputs = host.input_types(cls.family.source)
        inputs.setdefault("optional", {})
        return inputs

    def call_host(self, device: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """The host's loader, with `device` as the one it finds."""
        if self.family.own_device:
            arguments = {**arguments, DEVICE: "cpu" if device == "cpu" else "default"}
        with host.computing_on(device):
            return host.call_node(self.family.source, arguments)


def validated(text: Any) -> bool | str:
    """True, or what is wrong with an expert string."""
    if not isinstance(text, str):
        return True
    return spec_problem(text, host.devices(), old=True) or True


class _Plain(_FromHost):
    """`...MultiGPU`: the host's loader on another device."""

    CATEGORY = "distorch/loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = cls.host_inputs()
        inputs["optional"][DEVICE] = device_input()
        return inputs

    def load(self, device: str | None = None, **arguments: Any) -> tuple[Any, ...]:
        """Loads, computing on `device`."""
        target = device or host.default_device()
        return tuple(
            outputs.on_device(value, target) for value in self.call_host(target, arguments)
        )


class _Placed(_FromHost):
    @classmethod
    def VALIDATE_INPUTS(cls, expert_mode_allocations: Any = "") -> bool | str:
        """Checked before anything runs; the host shows the message on the node."""
        return validated(expert_mode_allocations)


class _DisTorch2(_Placed):
    """`...DisTorch2MultiGPU`: every output is placed."""

    CATEGORY = "distorch/loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = cls.host_inputs()
        inputs["optional"] |= distorch2_inputs(cls.family.device_input, cls.family.eject)
        return inputs

    def load(
        self,
        virtual_vram_gb: float = 4.0,
        donor_device: str = "cpu",
        expert_mode_allocations: str = "",
        eject_models: bool | None = None,
        **arguments: Any,
    ) -> tuple[Any, ...]:
        """Loads and places every output."""
        device = arguments.pop(self.family.device_input, None) or host.default_device()
        eject_if_asked(eject_models, self.family.eject)
        found = self.call_host(device, arguments)
        return place_all(found, device, virtual_vram_gb, donor_device, expert_mode_allocations)


def eject_if_asked(asked: bool | None, default: bool) -> None:
    """Frees what other models hold; `asked` is None where a saved workflow does not say."""
    if default if asked is None else asked:
        host.eject_models()


def place_all(
    found: tuple[Any, ...],
    device: str,
    virtual_vram_gb: float,
    donor: str,
    expert: str,
) -> tuple[Any, ...]:
    """Every output of a loader where the old inputs want it."""
    placement = old_placement(device, virtual_vram_gb, donor, expert, host.devices())
    if placement is None:
        return tuple(outputs.on_device(value, device) for value in found)
    if not any(outputs.patcher_of(value) is not None for value in found):
        kinds = ", ".join(sorted({type(value).__name__ for value in found}))
        raise PlacementError(
            f"this loader gives out {kinds}, whose weights ComfyUI does not manage, so they cannot "
            "be placed; use ComfyUI's own loader"
        )
    return tuple(outputs.distributed(value, placement) for value in found)


def _made(kind: type[_FromHost], name: str, family: Family, title: str) -> type[_FromHost]:
    source = host.node_class(family.source)
    fields = {"family": family, "TITLE": title, "RETURN_TYPES": tuple(source.RETURN_TYPES)}
    names = getattr(source, "RETURN_NAMES", None)
    if names:
        fields["RETURN_NAMES"] = tuple(names)
    return type(name, (kind,), fields)


def core_nodes() -> Iterator[tuple[str, type[_FromHost]]]:
    """(id, class) of the plain and DisTorch2 loaders of every loader that the host has."""
    for family in CORE:
        if host.node_class(family.source) is None:
            continue
        for suffix, kind, note in (
            ("MultiGPU", _Plain, "MultiGPU"),
            ("DisTorch2MultiGPU", _DisTorch2, "DisTorch2"),
        ):
            name, title = family.source + suffix, f"{family.source} ({note})"
            yield name, _made(kind, name, family, title)
            if name == "CheckpointLoaderSimpleDisTorch2MultiGPU":  # both spellings were published
                other = name.replace("DisTorch", "Distorch")
                yield other, _made(kind, other, family, title)
