# SPDX-License-Identifier: Apache-2.0
"""Inputs for a transformers model, found by trying what its forward takes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .shrink import IMAGE

Inputs = dict[str, Any]
LENGTH = 12
FRAMES = 4


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(type(config), "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None and not isinstance(sub, dict):
            yield from _configs(sub)


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    for part in _configs(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def token_ids(config: Any, length: int = LENGTH) -> torch.Tensor:
    """Ids [2, length] that mean nothing special."""
    vocabulary = _setting(config, "vocab_size", default=50)
    special = {
        value
        for part in _configs(config)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    usual = [i for i in range(3, vocabulary) if i not in special] or [0]
    return torch.tensor([usual[i * 7 % len(usual)] for i in range(2 * length)]).view(2, length)


def _pictures(config: Any) -> Iterator[torch.Tensor]:
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    size = _setting(config, "image_size", "img_size", default=IMAGE)
    for side in dict.fromkeys((size, IMAGE, 64, 128)):
        if side <= 256:
            yield noise(2, channels, side, side)
    frames = _setting(config, "num_frames", default=FRAMES)
    yield noise(2, frames, channels, min(size, 64), min(size, 64))


def _patches(config: Any) -> torch.Tensor:
    """The 4 x 4 flattened patches of one picture."""
    channels = _setting(config, "in_channels", "in_chans", "num_channels", default=3)
    side = _setting(config, "patch_size", "spatial_patch_size", default=8)
    frames = _setting(config, "temporal_patch_size", default=1)
    return noise(16, channels * frames * side * side)


def _sounds(config: Any, name: str) -> Iterator[torch.Tensor]:
    bins = _setting(config, "num_mel_bins", "n_mels", "feature_size", "input_dim", default=16)
    positions = _setting(config, "max_source_positions", default=32)
    if name == "input_values":
        yield noise(2, 1600)
        yield noise(2, 64, bins)
        yield noise(2, 1, 1600)
    for frames in dict.fromkeys((2 * positions, 64, 128)):
        yield noise(2, bins, frames)
        yield noise(2, frames, bins)


def _with_masks(inputs: Inputs, names: set[str]) -> Inputs:
    ids = inputs.get("input_ids")
    if ids is not None and "attention_mask" in names:
        return inputs | {"attention_mask": torch.ones_like(ids)}
    return inputs


def candidates(module: nn.Module) -> Iterator[Inputs]:
    """Inputs that a model may accept, the fullest first."""
    config: Any = module.config
    names = set(inspect.signature(module.forward).parameters)
    text: Inputs = {}
    if "input_ids" in names:
        text = {"input_ids": token_ids(config)}
    if "bbox" in names and text:
        text["bbox"] = torch.arange(2 * LENGTH * 4).view(2, LENGTH, 4) % 16
    if "decoder_input_ids" in names:
        text["decoder_input_ids"] = token_ids(config, 5)
    pictures = [{n: p} for n in ("pixel_values", "pixel_values_videos") if n in names
                for p in _pictures(config)]  # fmt: skip
    sounds = [{n: s} for n in ("input_features", "input_values", "audio_values") if n in names
              for s in _sounds(config, n)]  # fmt: skip
    for media in [*pictures, *sounds]:
        yield _with_masks({**text, **media}, names)
    for media in [*pictures, *sounds]:
        yield {**media}
    grids = {"image_grid_thw", "grid_thw"} & names
    if "hidden_states" in names and grids:
        yield {"hidden_states": _patches(config), "grid_thw": torch.tensor([[1, 4, 4]])}
    elif "pixel_values" in names and grids:
        yield {"pixel_values": _patches(config), grids.pop(): torch.tensor([[1, 4, 4]])}
    if "past_values" in names:
        length = _setting(config, "context_length", default=16)
        yield {"past_values": noise(2, length, _setting(config, "num_input_channels", default=1))}
    if text:
        yield _with_masks(text, names)
        yield text
        yield {"input_ids": text["input_ids"]}


def find(module: nn.Module) -> Inputs:
    """The first inputs that a resident model runs with. RuntimeError when none does."""
    reasons = []
    for inputs in candidates(module):
        try:
            with torch.no_grad():
                module(**copy.deepcopy(inputs))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error)[:150]}")
        else:
            return inputs
    raise RuntimeError(reasons[0] if reasons else "no arguments that are known")
