# SPDX-License-Identifier: Apache-2.0
"""Recipes: what stays on a GPU of 8, 12, 16 or 24 GB, for published models. Computed, not measured.

Weights and activations are computed on the meta device, from published configurations. Nothing is
downloaded, and no weight has memory. The placements are those of distorch's own planner.

What is assumed: the desktop and the CUDA context take 1 GiB of the card, workspaces of libraries
and gaps between blocks of memory half a GiB, and the rest of the system 8 GiB of RAM. Attention is
fused. Blocks of memory are multiples of 512 bytes. 1 gb is 2^30 bytes, in placement strings and in
the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from _activations import check_tracker, peak_bytes
from _recipe_models import MODELS, PARTS, Model, inventory_of, published_form
from _recipe_tables import Row, markdown, matrix

from distorch.integrations.budget import plan_together
from distorch.planner import DeviceInfo, Inventory, Plan
from distorch.runtime.groups import group_members
from distorch.runtime.options import Options
from distorch.runtime.ring_room import is_table, ring_bytes

GIB, MIB, PAGE = 1 << 30, 1 << 20, 4096
CARDS, RAMS = (8, 12, 16, 24), (32, 64)  # GiB
CARD_RESERVE, RAM_RESERVE = 3 * GIB // 2, 8 * GIB
STEP = GIB // 2  # shares are multiples of this
# The planner asks CUDA how much memory is free on a device called "cuda", and no other type. So the
# card has another name until it is printed.
CARD = "xpu:0"
PLENTY = 1 << 50


@cache
def module_of(key: str) -> Any:
    """A part on the meta device."""
    return PARTS[key].make()


@cache
def untiled(key: str) -> int:
    """Peak bytes of one forward of a part, inputs and results included, weights not."""
    return peak_bytes(module_of(key), PARTS[key].run)


@cache
def tiled_peak(key: str) -> int:
    """The same for a VAE that decodes tile by tile."""
    part, module = PARTS[key], PARTS[key].make()
    assert part.tile is not None
    part.tile(module)
    return peak_bytes(module, part.run)


def activations(key: str, tiled: bool = False) -> int:
    return tiled_peak(key) if tiled and PARTS[key].tile else untiled(key)


@cache
def inventory(key: str) -> Inventory:
    """The part's weights with the bytes that its file has."""
    return inventory_of(module_of(key), PARTS[key].narrow)


@cache
def fetches(key: str) -> Mapping[str, tuple[int, bool]]:
    """Weight -> bytes of the ring that a use of it takes, and whether it takes them even where it
    is resident: a narrow weight is decoded there, too.
    """
    wide = {weight.name: weight.nbytes for weight in inventory_of(module_of(key), None).weights}
    found = {}
    for weight in inventory(key).weights:
        decoded = wide[weight.name] if weight.nbytes != wide[weight.name] else 0
        if weight.kind == "parameter":
            found[weight.name] = weight.nbytes + decoded + 2 * PAGE, decoded > 0
    return found


def ring(key: str, plan: Plan) -> int:
    """Bytes of the default look-ahead."""
    if PARTS[key].narrow is None:
        groups = group_members(module_of(key))
        return ring_bytes(groups, plan, Options())
    # The module is not made of what it decodes, so here is the same rule for its sizes.
    uses = fetches(key).items()
    sizes = [n for name, (n, decoded) in uses if decoded or plan.placement[name] != CARD]
    return min(sum(sizes), max(2 * max(sizes, default=0), 128 * MIB))


def planned(model: Model, spec: str) -> dict[str, Plan]:
    """Each part's plan, as `load_pipeline` makes it."""
    devices = {name: DeviceInfo(name, PLENTY, PLENTY) for name in (CARD, "cpu", "disk")}
    parts = {name: inventory(key) for name, key in model.parts.items()}
    # Here, names begin with the part. Where all is resident there is nothing to say.
    patterns = {k: [f"*{value}"] for k, value in model.options.items() if ";" in spec}
    return plan_together(parts, spec, Options(min_bytes="auto", **patterns), devices)[1]


@dataclass(frozen=True)
class Choice:
    """A placement on a card, in bytes. `share` None: the whole model. `activations` are those of
    the part that needs most.
    """

    share: int | None
    tiled: bool
    plans: Mapping[str, Plan]
    ring: int
    activations: int

    @property
    def resident(self) -> int:
        return self.on(CARD)

    @property
    def taken(self) -> int:
        """Of the card."""
        return max(self.resident, self.share or 0) + self.ring + self.activations

    def on(self, device: str) -> int:
        return sum(plan.bytes.get(device, 0) for plan in self.plans.values())


def choice(model: Model, share: int | None, tiled: bool) -> Choice:
    """What a share takes."""
    plans = planned(model, f"{CARD},*" if share is None else f"{CARD},{share}b;cpu,*")
    rings = [ring(model.parts[name], plan) for name, plan in plans.items()]
    peak = max(activations(key, tiled) for key in model.parts.values())
    return Choice(share, tiled, plans, max(rings), peak)


def largest(model: Model, card: int, tiled: bool) -> Iterator[Choice]:
    """The largest share that fits, if one does."""
    room = card * GIB - CARD_RESERVE
    most = max(0, room - max(activations(key, tiled) for key in model.parts.values()))
    all_of_it = sum(inventory(key).total_bytes for key in model.parts.values())
    whole = [None] if all_of_it <= most else []
    for share in (*whole, *range(most // STEP * STEP, -1, -STEP)):
        found = choice(model, share, tiled)
        if found.taken <= room:
            yield found
            return


def best(model: Model, card: int) -> Choice | None:
    """The placement of which least travels. Tiles are used only if less does because of them."""
    fits = [*largest(model, card, tiled=False)]
    if not fits or any(travels(model, fits[0]).values()):
        fits += largest(model, card, tiled=True)
    return min(fits, key=lambda found: sum(travels(model, found).values()), default=None)


@cache
def tables(key: str) -> frozenset[str]:
    """Names of the weights of which rows are fetched, if they are larger than the ring."""
    groups = group_members(module_of(key))
    return frozenset(group.name for group in groups if is_table(group))


def travels(model: Model, found: Choice, device: str = "") -> dict[str, int]:
    """Step part -> bytes that one forward of it fetches, from all donors or from one."""

    def fetched(part: str) -> int:
        plan, rows = found.plans[part], tables(model.parts[part])
        sizes = {n: size for n, size in plan.sizes.items() if plan.placement[n] != CARD}
        if device:
            sizes = {n: size for n, size in sizes.items() if plan.placement[n] == device}
        return sum(size for n, size in sizes.items() if not (n in rows and size > found.ring))

    return {part: fetched(part) for part in model.step_parts}


def gb(nbytes: float) -> str:
    """ "2.5gb": as in a placement string."""
    return f"{nbytes / GIB:g}gb" if nbytes else "0b"


def spec_of(found: Choice, ram: int | None = None) -> str:
    """The placement string, for a machine with so many GiB of RAM or with enough."""
    if found.share is None:
        return "cuda:0,*"
    room = PLENTY if ram is None else ram * GIB - RAM_RESERVE
    donors = "cpu,*" if found.on("cpu") <= room else f"cpu,{gb(room)};disk,*"
    return f"cuda:0,{gb(found.share)};{donors}"


def recipe(model: Model, card: int) -> Row:
    """One row; bytes. `travels`: step part -> bytes that one forward of it fetches."""
    row: Row = {"model": model.name, "load": model.load, "card": card, "options": model.options}
    found = best(model, card)
    if found is None:
        return {**row, "fits": False}
    specs = {ram: spec_of(found, ram) for ram in RAMS}
    with_disk = {
        ram: replace(found, plans=planned(model, spec.replace("cuda:0", CARD)))
        for ram, spec in specs.items()
        if "disk" in spec
    }
    return row | {
        "fits": True, "whole": found.share is None, "tiled": found.tiled,
        "placement": spec_of(found), "placement_with_ram": specs,
        "resident": found.resident, "look_ahead": found.ring, "activations": found.activations,
        "forwards_per_step": model.forwards,
        "travels": travels(model, found), "ram": found.on("cpu"), "share": found.share,
        "left": card * GIB - CARD_RESERVE - found.taken,
        "travels_from_disk": {ram: travels(model, c, "disk") for ram, c in with_disk.items()},
    }  # fmt: skip


def part_row(key: str) -> Row:
    """Bytes of a part, beside what was published."""
    part, plain = PARTS[key], activations(key)
    size, where = part.published
    stored = published_form(part, module_of(key))
    assert abs(stored - size) < size / 1000, (key, stored, size)
    return {
        "weights": inventory(key).total_bytes, "published": size, "published_where": where,
        "computed_as_published": stored, "activations": plain,
        "activations_tiled": activations(key, True) if part.tile else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="models whose names contain this")
    parser.add_argument("--json", type=Path, help="write everything computed here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    check_tracker()
    models = [model for model in MODELS if (options.only or "") in model.name]
    rows = [recipe(model, card) for model in models for card in CARDS]
    text = f"{matrix(rows)}\n\n{markdown(rows)}\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        keys = dict.fromkeys(key for model in models for key in model.parts.values())
        versions = {lib.__name__: lib.__version__ for lib in (torch, diffusers, transformers)}
        content = {
            "versions": versions, "card_reserve": CARD_RESERVE, "ram_reserve": RAM_RESERVE,
            "parts": {key: part_row(key) for key in keys}, "recipes": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
