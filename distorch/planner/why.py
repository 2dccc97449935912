# SPDX-License-Identifier: Apache-2.0
"""Why a weight lies where it lies, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from distorch.display.tables import human_bytes


class Why(str, Enum):
    """What decided about a weight. The values stand in files of plans."""

    BUFFER = "buffer"
    EMPTY = "empty"
    DTYPE = "dtype"
    SMALL = "small"
    KEEP = "keep"
    RULE = "rule"
    OFFLOAD = "offload"
    FREE = "free"


_HOW = {
    "interleaved": "weights that leave are spread evenly over the model",
    "sequential": "the first bytes of the model go to the first entry of the placement, and so on",
    "optimal": "of the placements that were tried, this one has the shortest step",
}


def sentence(  # noqa: PLR0917
    name: str, why: Why | None, place: str, compute: str, order: str, options: Mapping[str, Any],
    held: Mapping[str, int],
) -> str:  # fmt: skip
    """`why` None: an older file does not say it. `held`: device -> bytes of the free weights."""
    reasons = {
        None: "the plan does not say why, since it was made by an older version",
        Why.BUFFER: "buffers stay on the device that computes",
        Why.EMPTY: "it has no bytes",
        Why.DTYPE: "only floating and quantised weights may leave the device that computes",
        Why.SMALL: "it has one dimension, or fewer bytes than min_bytes "
        f"({options.get('min_bytes')}), and stays on the device that computes",
        Why.KEEP: "keep= names it",
        Why.RULE: "a rule of rules= sends it there",
        Why.OFFLOAD: "offload= names it, so it must leave",
    }
    said = f"{name!r} lies on {place}: "
    if why is not Why.FREE:
        return said + reasons[why]
    movable = sum(held.values())
    if held.get(compute, 0) == movable:
        return f"{said}it has room for all weights"
    here = human_bytes(held.get(place, 0))
    return (
        f"{said}of the {human_bytes(movable)} that may leave {compute}, {place} "
        f"{'keeps' if place == compute else 'gets'} {here}, and {_HOW.get(order, order)}"
    )
