# SPDX-License-Identifier: Apache-2.0
"""What several commands print."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distorch.planner import Plan
    from distorch.timeline import Timeline

PLOT = "also draw it: a file that ends in .svg, or in .png (needs Pillow)"


def show(found: Plan | Timeline, arguments: argparse.Namespace) -> int:
    """Prints it as a table or as JSON, and draws it if that is wanted."""
    if arguments.plot:
        found.plot(arguments.plot)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)
    if arguments.plot and not arguments.json:
        print(f"picture: {arguments.plot}")
    return 0
