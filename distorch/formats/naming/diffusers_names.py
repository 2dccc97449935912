# SPDX-License-Identifier: Apache-2.0
"""Original names -> those of a diffusers module: its own conversions say how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from distorch.formats.naming.tracing import Convert


def conversions_for(module: nn.Module) -> Iterator[Convert]:
    """What `from_pretrained` and `from_single_file` of the module's class do to a state dict."""
    classes = [cls for cls in type(module).__mro__ if cls.__module__.startswith("diffusers.")]
    if not classes:
        return
    for name in _OWN_RENAMINGS:
        if hasattr(module, name):
            yield partial(_renamed_in_place, getattr(module, name))
    from diffusers.loaders import single_file_model

    table: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    known = next((cls.__name__ for cls in classes if cls.__name__ in table), None)
    if known is not None:
        function = table[known]["checkpoint_mapping_fn"]
        config = dict(getattr(module, "config", {}))
        yield lambda checkpoint: function(checkpoint=checkpoint, config=config)


# Attention of old VAEs: query, key, value, proj_attn. The method had another name once.
_OWN_RENAMINGS = ("_fix_state_dict_keys_on_load", "_convert_deprecated_attention_blocks")


def _renamed_in_place(
    rename: Callable[[dict[str, torch.Tensor]], Any], checkpoint: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    renamed = dict(checkpoint)
    rename(renamed)
    return renamed
