# SPDX-License-Identifier: Apache-2.0
"""The rows of recipes.py as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
GIB = 1 << 30


def total(row: Row) -> int:
    return sum(row["travels"].values())


def number(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} gb"


def either(sizes: Mapping[str, int]) -> str:
    """Of the step parts, one runs in a step."""
    return " or ".join(f"{n / GIB:.1f}" for n in sizes.values()) + " gb"


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if not row["fits"]:
        return [row["model"], f"{row['card']} GB", "does not fit", *[""] * 5]
    times = f"{row['forwards_per_step']} x " if row["forwards_per_step"] > 1 else ""
    tiles = ", VAE tiled" if row["tiled"] else ""
    options = {} if row["whole"] else row["options"]
    more = "".join(f', `{name}="{pattern}"`' for name, pattern in options.items())
    return [
        row["model"], f"{row['card']} GB", f"`{row['placement']}`{more}",
        "all, " + number(row["resident"]) if row["whole"] else number(row["resident"]),
        times + either(row["travels"]) if total(row) else "nothing", number(row["look_ahead"]),
        number(row["activations"]) + tiles, ram_cell(row),
    ]  # fmt: skip


def ram_cell(row: Row) -> str:
    """Bytes in RAM, and what to write where that is too much."""
    if row["whole"]:
        return "none"
    short = {ram: spec for ram, spec in row["placement_with_ram"].items() if "disk" in spec}
    enough = [ram for ram in row["placement_with_ram"] if ram not in short]
    words = [f"{enough[0]} GB" if enough else f"more than {max(short)} GB"]
    for ram, spec in short.items():
        reads = row["travels_from_disk"][ram]
        note = f" ({either(reads)} of it from disk)" if any(reads.values()) else ""
        words.append(f"{ram} GB: `{spec}`{note}")
    return f"{number(row['ram'])}: " + "; ".join(words)


def markdown(rows: Iterable[Row]) -> str:
    """The table."""
    titles = ["model", "card", "placement", "resident", "travels per step", "look-ahead",
              "activations", "RAM"]  # fmt: skip
    lines = [titles, ["---"] * len(titles), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def matrix(rows: Iterable[Row]) -> str:
    """Shares by model and card, with what travels in a step; a row for each model."""
    models: dict[str, dict[int, str]] = {}
    for row in rows:
        share = row["placement"].removeprefix("cuda:0,").split(";")[0]
        times = f"{row['forwards_per_step']} x " if row["forwards_per_step"] > 1 else ""
        moved = times + either(row["travels"]).removesuffix(" gb") if total(row) else "0"
        models.setdefault(row["model"], {})[row["card"]] = f"`{share}` ({moved})"
    cards = list(next(iter(models.values())))
    lines = [["model", *(f"{card} GB" for card in cards)], ["---"] * (1 + len(cards))]
    lines += [[name, *found.values()] for name, found in models.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
