# SPDX-License-Identifier: Apache-2.0
"""Scales of narrow weights that a conversion splits: each part gets its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from distorch.errors import FormatError
from distorch.formats.naming.tracing import Run, as_stored
from distorch.formats.scales import BLOCK, may_have_scales, scale_keys
from distorch.formats.stored import StoredTensor

# id of a stored weight -> ending of a key, as {} stands for the weight's stem -> its scales
Scales = dict[int, dict[str, StoredTensor]]


def take_scales(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], Scales]:
    """The weights without the scales that lie beside them; and those, by weight."""
    scales: Scales = {}
    taken = set()
    for name, stored in tensors.items():
        if not may_have_scales(stored):
            continue
        beside = {ending: key for ending, key in scale_keys(name).items() if key in tensors}
        taken |= set(beside.values())
        scales[id(stored)] = {ending: tensors[key] for ending, key in beside.items()}
    return {name: stored for name, stored in tensors.items() if name not in taken}, scales


def scales_of_part(name: str, runs: Sequence[Run], scales: Scales) -> dict[str, StoredTensor]:
    """The scales of a weight of the module, by key. FormatError where they cannot be told apart."""
    sources = {id(run.source): run.source for run in runs}
    beside = [scales[key] for key in sources if scales.get(key)]
    if not beside:
        return {}
    if len(sources) > 1:
        raise FormatError(
            f"{name!r} is put together from {', '.join(s.name for s in sources.values())}, which "
            "have scales of their own; load a version of the file without scales"
        )
    keys = scale_keys(name)
    return {keys[end]: _part(keys[end], runs, scale) for end, scale in beside[0].items()}


def _part(key: str, runs: Sequence[Run], scale: StoredTensor) -> StoredTensor:
    """The scales of these elements."""
    source = runs[0].source
    elements, count = prod(source.shape), prod(scale.shape)
    whole = len(runs) == 1 and runs[0].end - runs[0].begin == elements
    if count == 1 or whole:
        return replace(scale, name=key)
    rows = source.shape[0]
    high = 1 if count == rows else BLOCK  # rows of the weight to a row of scales
    step = elements // rows * high
    per_row = count // -(-rows // high)
    if any(run.begin % step or (run.end % step and run.end != elements) for run in runs):
        raise FormatError(
            f"{scale.name!r} has one scale for {high} rows of {source.name!r}, and the module cuts "
            "it elsewhere; load a version of the file without scales"
        )
    parts = [Run(scale, r.begin // step * per_row, -(-r.end // step) * per_row) for r in runs]
    shape = (sum(part.end - part.begin for part in parts) // per_row, *scale.shape[1:])
    return as_stored(key, parts, shape)
