# SPDX-License-Identifier: Apache-2.0
"""Names in checkpoints of the hub -> those of a transformers module: its own conversions say how.

transformers keeps old names on the hub and renames, joins and splits weights when it reads them:
`LayerNorm.gamma`, prefixes of a model with another head, one tensor per expert of a mixture.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from distorch.formats.naming.tracing import Convert


def conversion_for(module: nn.Module) -> Convert | None:
    """What `from_pretrained` of the module's class does to a state dict; None if it is not of
    transformers, or of a version that has no such conversions.
    """
    if not any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__):
        return None
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import rename_source_key
    except ImportError:
        return None
    if not isinstance(module, PreTrainedModel):
        return None
    transforms, wanted = get_model_conversion_mapping(module), module.state_dict()
    return partial(_converted, module, wanted, transforms, rename_source_key)


def _converted(
    module: Any,
    wanted: Mapping[str, Any],
    transforms: Sequence[Any],
    rename: Callable[..., tuple[str, str | None]],
    checkpoint: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The state dict under the module's names, by the same steps as in transformers: first every
    name is changed, then the tensors that make one weight are joined. Tensors that the module has
    no place for are left out.
    """
    converters = [each for each in transforms if hasattr(each, "operations")]
    renamings = [each for each in transforms if not hasattr(each, "operations")]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = module.base_model_prefix
    found: dict[str, torch.Tensor] = {}
    joined: dict[str, Any] = {}
    for key in sorted(checkpoint, key=_natural):
        name, pattern = rename(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            found[name] = checkpoint[key]
            continue
        if name not in joined:
            joined[name] = copy.deepcopy(by_pattern[pattern])
        joined[name].add_tensor(name, key, pattern, partial(checkpoint.__getitem__, key))
    for name, converter in joined.items():
        made = converter.convert(name, model=module, config=module.config)
        for target, value in made.items():
            found[target] = value[0] if isinstance(value, list) else value
    return found


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts `experts.10` behind `experts.9`: experts are joined in the order of their numbers."""
    steps = re.split(r"(\d+)", name)
    return [(0, int(step)) if step.isdigit() else (1, step) for step in steps]
