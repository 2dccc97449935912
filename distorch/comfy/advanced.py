# SPDX-License-Identifier: Apache-2.0
"""Checkpoint loaders with a place for each part, the device selector, the low-precision loader."""

from __future__ import annotations

from typing import Any

from distorch.comfy import host, loaders, outputs

_CHECKPOINT = "CheckpointLoaderSimple"


class CheckpointLoaderAdvancedMultiGPU:
    """A checkpoint whose three parts compute on devices of their own."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION, CATEGORY = "load_checkpoint", "distorch/loaders"
    TITLE = "Checkpoint Loader Advanced (MultiGPU)"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            **host.input_types(_CHECKPOINT)["required"],
            "unet_device": loaders.device_input(),
            "clip_device": loaders.device_input(),
            "vae_device": loaders.device_input(),
        }
        return {"required": required}

    def load_checkpoint(
        self, ckpt_name: str, unet_device: str, clip_device: str, vae_device: str
    ) -> tuple[Any, ...]:
        """MODEL, CLIP, VAE."""
        with host.computing_on(unet_device):
            model, clip, vae = host.call_node(_CHECKPOINT, {"ckpt_name": ckpt_name})[:3]
        return (
            outputs.on_device(model, unet_device),
            outputs.on_device(clip, clip_device),
            outputs.on_device(vae, vae_device),
        )


class CheckpointLoaderAdvancedDisTorch2MultiGPU:
    """A checkpoint whose model and text encoder are placed, each its own way."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION, CATEGORY = "load_checkpoint", "distorch/loaders"
    TITLE = "Checkpoint Loader Advanced (DisTorch2)"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        cpu = (host.computing_devices(), {"default": "cpu"})
        tip = "LoRAs are always added in float32; the input is kept for saved workflows."
        return {
            "required": {
                **host.input_types(_CHECKPOINT)["required"],
                "unet_compute_device": loaders.device_input(),
                "unet_virtual_vram_gb": loaders.virtual_vram_input(),
                "unet_donor_device": loaders.donor_input(),
                "clip_compute_device": cpu,
                "clip_virtual_vram_gb": loaders.virtual_vram_input(default=2.0),
                "clip_donor_device": loaders.donor_input(),
                "vae_device": loaders.device_input(),
            },
            "optional": {
                "unet_expert_mode_allocations": loaders.expert_input(),
                "clip_expert_mode_allocations": loaders.expert_input(),
                "high_precision_loras": loaders.boolean_input(True, tip),
                "eject_models": loaders.boolean_input(True, loaders.EJECT_TIP),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, unet_expert_mode_allocations: Any = "", clip_expert_mode_allocations: Any = ""
    ) -> bool | str:
        """Both placement strings."""
        unet = loaders.validated(unet_expert_mode_allocations)
        return unet if unet is not True else loaders.validated(clip_expert_mode_allocations)

    def load_checkpoint(
        self,
        ckpt_name: str,
        unet_compute_device: str,
        unet_virtual_vram_gb: float,
        unet_donor_device: str,
        clip_compute_device: str,
        clip_virtual_vram_gb: float,
        clip_donor_device: str,
        vae_device: str,
        unet_expert_mode_allocations: str = "",
        clip_expert_mode_allocations: str = "",
        high_precision_loras: bool = True,
        eject_models: bool = True,
    ) -> tuple[Any, ...]:
        """MODEL, CLIP, VAE."""
        if eject_models:
            host.eject_models()
        with host.computing_on(unet_compute_device):
            model, clip, vae = host.call_node(_CHECKPOINT, {"ckpt_name": ckpt_name})[:3]
        (model,) = loaders.place_all(
            (model,), unet_compute_device, unet_virtual_vram_gb, unet_donor_device,
            unet_expert_mode_allocations,
        )  # fmt: skip
        (clip,) = loaders.place_all(
            (clip,), clip_compute_device, clip_virtual_vram_gb, clip_donor_device,
            clip_expert_mode_allocations,
        )  # fmt: skip
        return model, clip, outputs.on_device(vae, vae_device)


class DeviceSelectorMultiGPU:
    """A device for the nodes that take one as an input."""

    RETURN_TYPES, RETURN_NAMES = ("MULTIGPUDEVICE",), ("device",)
    FUNCTION, CATEGORY = "select_device", "distorch"
    TITLE = "Device Selector (MultiGPU)"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"device": (host.computing_devices(),)}}

    def select_device(self, device: str) -> tuple[str]:
        """The name of the device."""
        return (device,)


class UNetLoaderLP:
    """The old low-precision loader. Patched fp8 weights stay fp8, as the host rounds them."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION, CATEGORY = "load_unet", "distorch/legacy"
    TITLE = "UNet Loader (LP)"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"unet_name": host.input_types("UNETLoader")["required"]["unet_name"]}}

    def load_unet(self, unet_name: str) -> tuple[Any, ...]:
        """MODEL."""
        return host.call_node("UNETLoader", {"unet_name": unet_name, "weight_dtype": "default"})


NODES: dict[str, Any] = {
    node.__name__: node
    for node in (
        CheckpointLoaderAdvancedMultiGPU,
        CheckpointLoaderAdvancedDisTorch2MultiGPU,
        DeviceSelectorMultiGPU,
        UNetLoaderLP,
    )
}

__all__ = ["NODES"]
