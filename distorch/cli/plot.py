# SPDX-License-Identifier: Apache-2.0
"""A picture of a plan: every weight in order, coloured by where it lives."""

from __future__ import annotations

from distorch.planner import Plan


def plot_plan(plan: Plan, path: str) -> None:
    """Writes a PNG: one bar in the order of the model, bytes to the right (needs matplotlib)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install distorch[plot]") from error
    devices = list(plan.bytes)
    figure = Figure(figsize=(10, 2.2), layout="constrained")
    axes = figure.subplots()
    for number, device in enumerate(devices):
        spans, position = [], 0
        for name, nbytes in plan.sizes.items():
            if plan.placement[name] == device:
                spans.append((position / 2**30, nbytes / 2**30))
            position += nbytes
        label = f"{device}: {plan.bytes[device] / 2**30:.2f} GiB"
        axes.broken_barh(spans, (0, 1), color=f"C{number}", label=label)
    axes.set_yticks([])
    axes.set_xlabel("GiB, in the order of the model")
    axes.set_title(f"{plan.spec}  ({plan.order})")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=len(devices))
    figure.savefig(path, dpi=120)
