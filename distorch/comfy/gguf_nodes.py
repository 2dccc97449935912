# SPDX-License-Identifier: Apache-2.0
"""GGUF loaders under the names of ComfyUI-GGUF and of the old pack; neither needs to be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distorch.comfy import gguf, host, loaders, outputs
from distorch.comfy.placement import Placement, old_placement

_MODELS = ("unet_gguf", "diffusion_models", "unet")
_TEXTS = ("clip_gguf", "text_encoders", "clip")
_DTYPES = (["default", "target", "float32", "float16", "bfloat16"], {"default": "default"})


class _Unet:
    """MODEL of a GGUF file."""

    RETURN_TYPES = ("MODEL",)
    eject = True

    @classmethod
    def own_inputs(cls) -> dict[str, Any]:
        return {"unet_name": (gguf.file_names(*_MODELS),)}

    def read(self, device: str, unet_name: str, dequant_dtype: str | None = None, **_: Any) -> Any:
        """The model, not placed yet."""
        return gguf.load_model(gguf.full_path(unet_name, *_MODELS), device, dequant_dtype)


class _UnetAdvanced(_Unet):
    """The same with the old pack's dtypes; patches are always added in float32."""

    @classmethod
    def own_inputs(cls) -> dict[str, Any]:
        return {
            **super().own_inputs(),
            "dequant_dtype": _DTYPES,
            "patch_dtype": _DTYPES,
            "patch_on_device": ("BOOLEAN", {"default": False}),
        }


class _Clip:
    """CLIP of one to four files, GGUF or not. `source`: the host's loader of as many."""

    RETURN_TYPES = ("CLIP",)
    eject = False
    source, count, fixed_type = "CLIPLoader", 1, ""

    @classmethod
    def own_inputs(cls) -> dict[str, Any]:
        files = {*gguf.file_names(*_TEXTS), *_listed("text_encoders")}
        names = ["clip_name"] if cls.count == 1 else [f"clip_name{i + 1}" for i in range(cls.count)]
        inputs: dict[str, Any] = {name: (sorted(files),) for name in names}
        if not cls.fixed_type:
            inputs["type"] = host.input_types(cls.source)["required"]["type"]
        return inputs

    def read(self, device: str, type: str = "", **names: str) -> Any:
        """The text encoder, not placed yet."""
        paths = [gguf.full_path(names[name], *_TEXTS) for name in sorted(names)]
        return gguf.load_clip(paths, type or self.fixed_type, device)


class _DualClip(_Clip):
    source, count = "DualCLIPLoader", 2


class _TripleClip(_Clip):
    source, count, fixed_type = "TripleCLIPLoader", 3, "sd3"


class _QuadrupleClip(_Clip):
    source, count, fixed_type = "QuadrupleCLIPLoader", 4, "hidream"


def _listed(kind: str) -> list[str]:
    import folder_paths

    return list(folder_paths.get_filename_list(kind))


READERS: dict[str, type[Any]] = {
    "UnetLoaderGGUF": _Unet,
    "UnetLoaderGGUFAdvanced": _UnetAdvanced,
    "CLIPLoaderGGUF": _Clip,
    "DualCLIPLoaderGGUF": _DualClip,
    "TripleCLIPLoaderGGUF": _TripleClip,
    "QuadrupleCLIPLoaderGGUF": _QuadrupleClip,
}


class _Node:
    """What the kinds below share: inputs of the file first, ours after them."""

    FUNCTION, CATEGORY = "load", "distorch/gguf"
    reader: type[Any]

    @classmethod
    def our_inputs(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls.reader.own_inputs(), "optional": cls.our_inputs()}

    def placed(self, device: str, placement: Placement | None, own: dict[str, Any]) -> tuple[Any]:
        """Blocks that are to stay on the compute device stay blocks there, too."""
        value = self.reader().read(device, **own)
        return (outputs.distributed(value, placement or Placement(f"{device},*", device)),)


class _PlainNode(_Node):
    @classmethod
    def our_inputs(cls) -> dict[str, Any]:
        return {"device": loaders.device_input()}

    def load(self, device: str | None = None, **own: Any) -> tuple[Any]:
        """All on one device."""
        return self.placed(device or host.default_device(), None, own)


class _BareNode(_PlainNode):
    """Under ComfyUI-GGUF's own name."""

    @classmethod
    def our_inputs(cls) -> dict[str, Any]:
        return {}


class _CheckedNode(_Node):
    @classmethod
    def VALIDATE_INPUTS(cls, expert_mode_allocations: Any = "") -> bool | str:
        """Checked before anything runs."""
        return loaders.validated(expert_mode_allocations)


class _LegacyNode(_CheckedNode):
    CATEGORY = "distorch/legacy"

    @classmethod
    def our_inputs(cls) -> dict[str, Any]:
        return loaders.legacy_inputs()

    def load(
        self,
        device: str | None = None,
        virtual_vram_gb: float = 0.0,
        use_other_vram: bool = False,
        expert_mode_allocations: str = "",
        **own: Any,
    ) -> tuple[Any]:
        """Placed by the first version's inputs."""
        target = device or host.default_device()
        placement = old_placement(
            target, virtual_vram_gb, "cpu", expert_mode_allocations, host.devices(),
            other_vram=use_other_vram,
        )  # fmt: skip
        return self.placed(target, placement, own)


class _DisTorch2Node(_CheckedNode):
    @classmethod
    def our_inputs(cls) -> dict[str, Any]:
        device = loaders.COMPUTE if cls.reader.eject else loaders.DEVICE
        return loaders.distorch2_inputs(device, cls.reader.eject)

    def load(
        self,
        virtual_vram_gb: float = 4.0,
        donor_device: str = "cpu",
        expert_mode_allocations: str = "",
        eject_models: bool | None = None,
        **own: Any,
    ) -> tuple[Any]:
        """Placed by the old inputs."""
        asked = [own.pop(name, None) for name in (loaders.COMPUTE, loaders.DEVICE)]
        target = next(filter(None, asked), None) or host.default_device()
        loaders.eject_if_asked(eject_models, self.reader.eject)
        placement = old_placement(
            target, virtual_vram_gb, donor_device, expert_mode_allocations, host.devices()
        )
        return self.placed(target, placement, own)


_KINDS = {
    "": _BareNode,
    "MultiGPU": _PlainNode,
    "DisTorchMultiGPU": _LegacyNode,
    "DisTorch2MultiGPU": _DisTorch2Node,
}


def nodes() -> Iterator[tuple[str, type[Any]]]:
    """(id, class) of every GGUF loader; those of ComfyUI-GGUF only where it is not installed."""
    for source, reader in READERS.items():
        if reader.eject is False and host.node_class(reader.source) is None:
            continue
        for suffix, kind in _KINDS.items():
            if not suffix and host.folder_of_pack("ComfyUI-GGUF"):
                continue
            fields = {
                "reader": reader,
                "RETURN_TYPES": reader.RETURN_TYPES,
                "TITLE": f"{source} ({suffix.removesuffix('MultiGPU') or suffix or 'distorch'})",
            }
            yield source + suffix, type(source + suffix, (kind,), fields)
