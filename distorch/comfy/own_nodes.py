# SPDX-License-Identifier: Apache-2.0
"""Nodes of our own: Distribute Model (also CLIP, VAE), Distribution Report."""

from __future__ import annotations

from typing import Any

from distorch.comfy import host, outputs, report
from distorch.comfy.patcher import is_ours
from distorch.comfy.placement import Placement, spec_problem
from distorch.comfy.presets import for_models, general
from distorch.errors import PlacementError, SpecError
from distorch.runtime.options import Options, compute_device


class AnyType(str):
    """A type name that fits every other: the host compares with `!=`."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANYTHING = AnyType("*")
_SPEC_TIP = (
    "Where the weights live: cuda:0,5gb;cpu,* keeps 5 GB on the GPU and the rest in RAM; "
    "cuda:0,25%;cpu,75% is a ratio; auto keeps as much as the host's free memory allows."
)


class _Distribute:
    """What a loader gives out goes in and comes out, placed by one string."""

    INPUT: str  # its name, and the output's
    RETURN_TYPES: tuple[str, ...]
    FUNCTION, CATEGORY = "distribute", "distorch"
    DESCRIPTION = (
        "Weights live where the placement says and arrive just in time; results are the same bits. "
        "The model that comes in stays as it is for whoever else uses it."
    )

    @staticmethod
    def presets() -> dict[str, str]:
        """Title -> spec, of which the web page makes a list."""
        return general()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                cls.INPUT: cls.RETURN_TYPES,
                "spec": (
                    "STRING",
                    {"default": "auto", "tooltip": _SPEC_TIP, "presets": cls.presets()},
                ),
            },
            "optional": {
                "compute_device": (
                    ["default", *host.computing_devices()],
                    {"default": "default", "tooltip": "Where the model computes."},
                ),
                "order": (
                    ["interleaved", "sequential"],
                    {"tooltip": "Offloaded weights spread over a step, or the first bytes first."},
                ),
                "prefetch": (
                    "STRING",
                    {"default": "auto", "tooltip": "Bytes of look-ahead, such as 512mb; 0b: none."},
                ),
                "lora_precision": (
                    ["as stored", "full"],
                    {"tooltip": "Patched fp8 weights: rounded to fp8 as the host does, or bf16."},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, spec: Any = "auto", prefetch: Any = "auto") -> bool | str:
        """Checked before anything runs."""
        if isinstance(prefetch, str):
            try:
                Options(prefetch=prefetch)
            except SpecError as error:
                return str(error)
        if not isinstance(spec, str):
            return True
        return spec_problem(spec, host.devices()) or True


def _placed(
    value: Any,
    spec: str,
    compute_device: str = "default",
    order: str = "interleaved",
    prefetch: str = "auto",
    lora_precision: str = "as stored",
) -> tuple[Any, ...]:
    patcher = outputs.patcher_of(value)
    if patcher is None:
        raise PlacementError(
            f"this {type(value).__name__} has no weights that ComfyUI manages, so they cannot be "
            "placed"
        )
    device = device_of(patcher) if compute_device == "default" else compute_device
    placement = Placement(
        spec, device, order=order, prefetch=prefetch, lora_precision=lora_precision
    )
    return (outputs.copy_of_output(value, placement),)


class DistributeModel(_Distribute):
    """MODEL in, MODEL out."""

    INPUT = "model"
    RETURN_TYPES, RETURN_NAMES = ("MODEL",), (INPUT,)
    TITLE = "Distribute Model"

    @staticmethod
    def presets() -> dict[str, str]:
        """Some for well-known models, too."""
        return general() | for_models()

    def distribute(
        self,
        model: Any,
        spec: str,
        compute_device: str = "default",
        order: str = "interleaved",
        prefetch: str = "auto",
        lora_precision: str = "as stored",
    ) -> tuple[Any, ...]:
        """The placed model."""
        return _placed(model, spec, compute_device, order, prefetch, lora_precision)


class _DistributeByName(_Distribute):
    """The same for nodes that only ComfyUI calls, with all inputs by name."""

    def distribute(self, spec: str, **given: Any) -> tuple[Any, ...]:
        """What came in, placed."""
        return _placed(given.pop(self.INPUT), spec, **given)


class DistributeCLIP(_DistributeByName):
    """CLIP in, CLIP out."""

    INPUT = "clip"
    RETURN_TYPES, RETURN_NAMES = ("CLIP",), (INPUT,)
    TITLE = "Distribute CLIP"


class DistributeVAE(_DistributeByName):
    """VAE in, VAE out."""

    INPUT = "vae"
    RETURN_TYPES, RETURN_NAMES = ("VAE",), (INPUT,)
    TITLE = "Distribute VAE"


def device_of(model: Any) -> str:
    """Where a patcher computes."""
    return compute_device(model.load_device)


class DistributionReport:
    """What is where, measured; what travelled, and how fast."""

    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING"), ("picture", "table")
    FUNCTION, CATEGORY = "report", "distorch"
    TITLE = "Distribution Report"
    DESCRIPTION = (
        "Where the weights of a model, text encoder or VAE are, measured now, and what travelled "
        "since the last report. Connect `after` to what should run first, such as the image."
    )
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (ANYTHING,)}, "optional": {"after": (ANYTHING,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Any = None) -> bool:
        """Outputs of every type may be connected."""
        return True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        """What it says is never old."""
        return float("nan")

    def report(self, model: Any, after: Any = None) -> dict[str, Any]:
        """A picture [1, height, width, 3] and a table."""
        patcher = outputs.patcher_of(model)
        if patcher is None or not is_ours(patcher):
            raise PlacementError(
                f"this {type(model).__name__} was not distributed: take a loader of ours or "
                "Distribute Model before it"
            )
        found = report.measured(patcher)
        return {
            "ui": {"text": [found.text], "distorch": [found.to_dict()]},
            "result": (found.picture(), found.text),
        }


NODES: dict[str, Any] = {
    "DistributeModel": DistributeModel,
    "DistributeCLIP": DistributeCLIP,
    "DistributeVAE": DistributeVAE,
    "DistributionReport": DistributionReport,
}
