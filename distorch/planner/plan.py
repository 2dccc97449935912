# SPDX-License-Identifier: Apache-2.0
"""The resolved placement: tensor by tensor, with a hash; saved, loaded, compared."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distorch._small_files import read_json, write_atomically
from distorch.display.picture import Picture
from distorch.display.placements import placement_strip
from distorch.display.tables import html_table, human_bytes, text_table
from distorch.errors import FormatError, SpecError
from distorch.planner.inventory import Inventory
from distorch.planner.why import Why, sentence

_VERSION = 2
_SHOWN = 3
_HEADER = ("device", "weights", "bytes", "size", "share")


@dataclass(frozen=True)
class PlanDiff:
    """What differs between two plans: (name, from, to, bytes); None where a name is missing."""

    moves: tuple[tuple[str, str | None, str | None, int], ...]

    def __bool__(self) -> bool:
        return bool(self.moves)

    def __len__(self) -> int:
        return len(self.moves)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(n, a or "(absent)", b or "(absent)", str(size)) for n, a, b, size in self.moves]

    def __str__(self) -> str:
        if not self.moves:
            return "no difference"
        return text_table(("weight", "from", "to", "bytes"), self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(("weight", "from", "to", "bytes"), self._rows())


@dataclass(frozen=True)
class Plan:
    """Where every weight lives. It prints as a table.

    Attributes:
        placement: Name of every parameter and buffer (aliases too) -> device.
        sizes: First name of each weight -> bytes.
        compute: The device that runs the model.
        spec: The placement string.
        order: "interleaved" or "sequential".
        floor: Bytes that cannot leave the compute device.
        budget: Bytes that the compute device may hold. None: the rest, or a share of 0b, which asks
            for no more than the floor.
        options: The other options that the plan was made with.
        why: Name -> what decided about the weight, for `explain`.
    """

    placement: Mapping[str, str]
    sizes: Mapping[str, int]
    compute: str
    spec: str
    order: str
    floor: int
    budget: int | None
    options: Mapping[str, Any]
    why: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def build(
        cls,
        inventory: Inventory,
        placement: Mapping[str, str],
        *,
        compute: str,
        spec: str,
        order: str,
        floor: int,
        budget: int | None,
        options: Mapping[str, Any],
        why: Mapping[str, Why],
    ) -> Plan:
        """A plan in the order of the inventory; `placement` names the first name of each weight."""
        everywhere = {
            name: placement[weight.name] for weight in inventory.weights for name in weight.names
        }
        sizes = {weight.name: weight.nbytes for weight in inventory.weights}
        reasons = {
            name: why[weight.name].value for weight in inventory.weights for name in weight.names
        }
        return cls(everywhere, sizes, compute, spec, order, floor, budget, dict(options), reasons)

    def explain(self, name: str) -> str:
        """Says in a sentence why a weight lies where it lies.

        Raises:
            SpecError: The plan has no weight of that name. The message has similar ones.
        """
        if name not in self.placement:
            close = difflib.get_close_matches(str(name), self.placement, n=_SHOWN, cutoff=0.3)
            raise SpecError(
                f"the plan has no weight {name!r}; similar names are "
                f"{', '.join(map(repr, close)) or 'not there either'}"
            )
        held: dict[str, int] = {}
        for own, nbytes in self.sizes.items():
            if self.why.get(own) == Why.FREE:
                held[self.placement[own]] = held.get(self.placement[own], 0) + nbytes
        why = Why(self.why[name]) if name in self.why else None
        return sentence(
            name, why, self.placement[name], self.compute, self.order, self.options, held
        )

    def resized(self, sizes: Mapping[str, int]) -> Plan:
        """The same places for weights that have other sizes now (bytes by first name)."""
        known = {name: sizes.get(name, size) for name, size in self.sizes.items()}
        return replace(self, sizes=known)

    @property
    def bytes(self) -> dict[str, int]:
        """Device -> bytes planned there (tied weights once), the compute device first."""
        found = {self.compute: 0}
        for name, nbytes in self.sizes.items():
            device = self.placement[name]
            found[device] = found.get(device, 0) + nbytes
        return found

    def over_budget(self, nbytes: int | None = None) -> str:
        """Why the compute device holds more than its share, and what to do; "" when it does not.

        `nbytes` are those that were found there; without them, those of the plan.
        """
        held = self.bytes[self.compute] if nbytes is None else nbytes
        if self.budget is None or held <= self.budget:
            return ""
        found = (
            f"{self.compute} gets {held} bytes ({human_bytes(held)}), more than its share of "
            f"{self.budget} ({human_bytes(self.budget)})"
        )
        if self.floor <= self.budget:
            return f"{found}: weights came or grew since; distorch.redistribute plans anew"
        here = [name for name in self.sizes if self.placement[name] == self.compute]
        largest = sorted(here, key=lambda name: -self.sizes[name])[:_SHOWN]
        kept, least = self.options.get("keep"), self.options.get("min_bytes")
        small = f"tensors that are 1-D or smaller than min_bytes ({least})"
        stay = ["buffers", *["what keep= names"] * bool(kept), *[small] * bool(least)]
        smaller = "min_bytes='auto' (smaller ones leave as needed) or min_bytes=0"
        to_do = [
            *[smaller] * bool(least), *["fewer names to keep"] * bool(kept), "a larger share"
        ]  # fmt: skip
        return (
            f"{found}: {self.floor} bytes must stay there ({', '.join(stay)}). The largest there "
            f"are {', '.join(map(repr, largest))}. Give {', or '.join(to_do)}"
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(self.sizes.values())

    @property
    def hash(self) -> str:
        """The SHA-256 of the canonical form. Equal plans have equal hashes on every machine."""
        return hashlib.sha256(_canonical(self._content()).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.hash)

    def _content(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "compute": self.compute,
            "spec": self.spec,
            "order": self.order,
            "floor": self.floor,
            "budget": self.budget,
            "options": dict(self.options),
            "placement": dict(self.placement),
            "sizes": dict(self.sizes),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types, with the hash and the bytes per device."""
        return {
            **self._content(), "hash": self.hash, "bytes": self.bytes, "why": dict(self.why),
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, atomically."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a saved plan. FormatError when it is damaged, changed, or of another version."""
        try:
            data = read_json(path)
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot read the plan {str(path)!r}: {error}") from error
        plan = cls._from_content(data, str(path))
        if plan.hash != data.get("hash"):
            raise FormatError(
                f"plan {str(path)!r}: its hash is {data.get('hash')!r} but its content gives "
                f"{plan.hash!r}: it was edited or damaged; make it again with distorch.plan"
            )
        return plan

    @classmethod
    def _from_content(cls, data: Any, path: str) -> Plan:
        if not isinstance(data, dict) or data.get("version") != _VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise FormatError(
                f"plan {path!r}: expected version {_VERSION}, found {found!r}; make it again with "
                "distorch.plan"
            )
        names = ("placement", "sizes", "compute", "spec", "order", "floor", "budget", "options")
        if missing := [name for name in names if name not in data]:
            raise FormatError(
                f"plan {path!r}: {', '.join(missing)} missing; make it again with distorch.plan"
            )
        for name in ("placement", "sizes", "options"):
            if not isinstance(data[name], dict):
                raise FormatError(f"plan {path!r}: {name} should be an object")
        wrong = [
            *(name for name, size in data["sizes"].items() if not _is_count(size)),
            *(name for name, place in data["placement"].items() if not isinstance(place, str)),
            *(name for name in ("compute", "spec", "order") if not isinstance(data[name], str)),
            *(["floor"] if not _is_count(data["floor"]) else []),
            *(["budget"] if data["budget"] is not None and not _is_count(data["budget"]) else []),
        ]
        if wrong:
            raise FormatError(f"plan {path!r}: {wrong[0]!r} has a value that it cannot have")
        if absent := [name for name in data["sizes"] if name not in data["placement"]]:
            raise FormatError(f"plan {path!r}: no placement for {absent[0]!r}")
        known = [reason.value for reason in Why]
        found = data.get("why")
        told = found.items() if isinstance(found, dict) else ()
        why = {name: word for name, word in told if word in known}
        return cls(**{name: data[name] for name in names}, why=why)

    def diff(self, other: Plan) -> PlanDiff:
        """What would move from this plan to the other one."""
        moves = []
        for name in [*self.placement, *(n for n in other.placement if n not in self.placement)]:
            here, there = self.placement.get(name), other.placement.get(name)
            if here != there:
                nbytes = self.sizes.get(name, other.sizes.get(name, 0))
                moves.append((name, here, there, nbytes))
        return PlanDiff(tuple(moves))

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        total = max(self.total_bytes, 1)
        rows = []
        for device, nbytes in self.bytes.items():
            count = sum(1 for name in self.sizes if self.placement[name] == device)
            role = " (compute)" if device == self.compute else ""
            share = f"{100 * nbytes / total:.1f}%"
            rows.append((device + role, str(count), str(nbytes), human_bytes(nbytes), share))
        rows.append(("total", str(len(self.sizes)), str(self.total_bytes),
                     human_bytes(self.total_bytes), "100.0%"))  # fmt: skip
        return rows

    def _title(self) -> str:
        return (
            f"plan {self.spec!r}, {self.order}, {self.hash[:12]}; "
            f"{human_bytes(self.floor)} cannot leave {self.compute}"
        )

    def __str__(self) -> str:
        return text_table(_HEADER, self._rows(), self._title())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), self._title()) + self.plot().svg()

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, notes: Sequence[str] = ()
    ) -> Picture:
        """A strip of all weights in the order of the model, coloured by device.

        With a `path` it is also saved there, with the errors of `Picture.save`. `notes` are more
        lines below.
        """
        weights = ((name, size, self.placement[name]) for name, size in self.sizes.items())
        title = f"{self.spec}   (plan, {self.order})"
        made = placement_strip(title, weights, self.bytes, {self.compute}, notes)
        return made if path is None else made.saved(path)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
