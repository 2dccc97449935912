# SPDX-License-Identifier: Apache-2.0
"""Two habits of MiniMax H3's LoRAs that no other family has. Source: diffusers' loader.

Its checkpoint keeps the rows of a fused projection head by head: queries, keys and values of the
first head, then of the second. All who train on it put the rows into the usual order first, but for
DiffSynth, whose files have PEFT's name for an adapter in their keys. And a file may have one alpha
for all layers in its header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from distorch.errors import FormatError
from distorch.lora.files import LoraFile
from distorch.lora.spellings import Group
from distorch.lora.targets import Targets

_OWN_WEIGHT = "adaln_proj.linear.weight"  # in every block, in diffusers and in its authors' code
_FUSED = ("attn.qkv_proj", "attn_qkv_proj")
_DIFFSYNTH = "default"
_HEAD_ROWS = 128  # of one head's queries, in all released models


def as_usual(file: LoraFile, groups: Mapping[str, Group], targets: Targets) -> None:
    """Changes the groups of a LoRA for MiniMax H3 to what other families' mean. FormatError."""
    if not any(name.endswith(_OWN_WEIGHT) for name in targets.shapes):
        return
    _take_header_alpha(file, groups)
    if any(group.adapter == _DIFFSYNTH for group in groups.values()):
        for stem, group in groups.items():
            if stem.endswith(_FUSED) and _goes_apart(stem, targets):
                for part in group.parts.keys() - {"down", "mid", "alpha"}:  # they have its rows
                    group.parts[part] = _by_projection(file, stem, group.parts[part])


def _take_header_alpha(file: LoraFile, groups: Mapping[str, Group]) -> None:
    """Gives every layer the header's alpha, unless the file says it in another way."""
    alpha, said = file.configuration.header_alpha, file.configuration.parts
    if alpha is None or said or any("alpha" in group.parts for group in groups.values()):
        return
    for group in groups.values():
        if "down" in group.parts:
            group.parts["alpha"] = torch.tensor(alpha)


def _goes_apart(stem: str, targets: Targets) -> bool:
    """Whether the fused projection is three layers of the module."""
    places = targets.find(stem)
    return bool(places) and all(re.search(r"\.to_[qkv]\.weight$", p.weight) for p in places)


def _by_projection(file: LoraFile, stem: str, rows: Tensor) -> Tensor:
    """Rows head by head as rows of all queries, all keys, all values."""
    count = rows.shape[0] if rows.dim() else 1
    if count % (3 * _HEAD_ROWS):
        raise FormatError(
            f"{file.label}: {stem!r}: its {count} rows are not those of whole heads, "
            f"{_HEAD_ROWS} each for queries, keys and values"
        )
    heads = rows.reshape(-1, 3, _HEAD_ROWS, *rows.shape[1:])
    return heads.transpose(0, 1).reshape(rows.shape)
