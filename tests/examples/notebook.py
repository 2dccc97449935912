# SPDX-License-Identifier: Apache-2.0
"""Runs examples/tour.ipynb from the top to the bottom.

    python -m tests.examples.notebook    writes its outputs anew (`make tour`)

The outputs are part of the file, so that readers on the web see them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"
_SECONDS = 300  # for one cell


def read(path: Path = TOUR) -> NotebookNode:
    """The notebook as it is in the file."""
    return nbformat.read(path, as_version=4)


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """A copy that was run in `folder`, with its outputs and without what differs each time."""
    done = copy.deepcopy(notebook)
    # What one cell prints comes in several pieces if the machine is slow.
    client = NotebookClient(
        done, timeout=_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute()
    # The version of this machine's Python, which says nothing to readers.
    done.metadata["language_info"] = {"name": "python"}
    return done


if __name__ == "__main__":
    nbformat.write(executed(read(), TOUR.parent), TOUR)
    print(f"wrote {TOUR}")
