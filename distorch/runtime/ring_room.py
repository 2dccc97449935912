# SPDX-License-Identifier: Apache-2.0
"""How large a ring is: bytes on the compute device for weights that were fetched ahead."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from distorch import _native, _ops
from distorch.machine.supposed import supposed
from distorch.planner import Plan, parse_bytes
from distorch.runtime.groups import Group
from distorch.runtime.options import Options
from distorch.runtime.staging import planned_place

AUTO_RING_BYTES = 128 << 20
_PAGE = 4096


def _fetched_bytes(group: Group, plan: Plan) -> int:
    """Room in the ring that a fetch of this group takes at most; 0: operators use it in place."""
    compute = plan.compute
    if _ops.is_sharded(group.first) and _ops.state(group.first).decoded:
        decoded = group.first.untyped_storage().nbytes()
        from_memory = compute == "cpu" and planned_place(group, plan) == "cpu"
        return decoded if from_memory else decoded + group.nbytes
    # The CPU computes with what is in RAM in place.
    in_place = (compute, "cpu") if compute == "cpu" else (compute,)
    return 0 if planned_place(group, plan) in in_place else group.nbytes


def is_table(group: Group) -> bool:
    """Whether the group belongs to embeddings alone, which look rows up. If such a table is larger
    than the ring, only these rows are fetched (csrc/hook/embedding.cpp).
    """
    return all(isinstance(m.owner, nn.Embedding) and m.key == "weight" for m in group.members)


def ring_bytes(groups: Sequence[Group], plan: Plan, options: Options) -> int:
    """Bytes of look-ahead: at least two of the largest weights that are fetched whole."""
    sizes = {g.name: n for g in groups if (n := _fetched_bytes(g, plan))}
    tables = {group.name for group in groups if is_table(group)}
    return look_ahead_bytes(sizes, tables, options.prefetch)


def reserved_beside(compute: str, reservation: object | None) -> int:
    """Bytes of look-ahead that other models have on a device: they share its ring, and the largest
    one counts. `reservation`: what the module itself has.
    """
    if supposed() is not None:  # nobody else is there
        return 0
    return _native.reserved_beside(compute, reservation)


def look_ahead_bytes(
    fetched: Mapping[str, int], tables: Collection[str], prefetch: int | str
) -> int:
    """The same for weights of which only the bytes are known. `tables` are those of embeddings."""
    sizes = {name: nbytes + 2 * _PAGE for name, nbytes in fetched.items()}
    largest = max((n for name, n in sizes.items() if name not in tables), default=0)
    wanted = max(2 * largest, AUTO_RING_BYTES)
    if prefetch != "auto":
        wanted = parse_bytes(prefetch)
    whole = sum(n for name, n in sizes.items() if name not in tables or n <= wanted)
    return min(whole, wanted)  # a ring that holds everything is never larger
