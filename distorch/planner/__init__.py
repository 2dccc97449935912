# SPDX-License-Identifier: Apache-2.0
"""From a placement string to a plan: pure policy over numbers, no devices."""

from distorch.planner.inventory import DeviceInfo, DevicesElsewhere, Inventory, WeightInfo
from distorch.planner.plan import Plan, PlanDiff
from distorch.planner.planner import (
    MIN_BYTES,
    ORDERS,
    Arrange,
    Freedom,
    PlanFor,
    can_leave,
    make_plan,
    shares_of,
    virtual_vram_spec,
)
from distorch.planner.spec import Entry, Rest, Spec, parse_bytes, parse_spec
from distorch.planner.why import Why

__all__ = [
    "MIN_BYTES",
    "ORDERS",
    "Arrange",
    "DeviceInfo",
    "DevicesElsewhere",
    "Entry",
    "Freedom",
    "Inventory",
    "Plan",
    "PlanDiff",
    "PlanFor",
    "Rest",
    "Spec",
    "WeightInfo",
    "Why",
    "can_leave",
    "make_plan",
    "parse_bytes",
    "parse_spec",
    "shares_of",
    "virtual_vram_spec",
]
