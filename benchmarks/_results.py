# SPDX-License-Identifier: Apache-2.0
"""What a benchmark has measured, in a file that is whole at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

Row = dict[str, Any]


class Results:
    """Sections of rows in a JSON file, which is replaced in one go whenever one comes.

    The file keeps the sections that it has from earlier runs. ValueError: they are of another card
    or version, which `facts` tell.
    """

    def __init__(self, path: Path | None, facts: Row) -> None:
        self._path = path
        self.found: Row = dict(facts)
        tqdm.write(json.dumps(facts))
        if path is not None and path.exists():
            earlier = json.loads(path.read_text())
            other = {k: earlier.get(k) for k, v in facts.items() if earlier.get(k) != v}
            if other:
                raise ValueError(f"{path} is of {other}, this is {facts}: give another --json")
            self.found = earlier

    def put(self, name: str, value: object) -> None:
        """A value, or a section as a whole."""
        self.found[name] = value
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        temporary.replace(self._path)

    def section(self, name: str, rows: Iterable[Row]) -> None:
        """All of a section: "done" names it once it has ended, so that half a section is told."""
        done = [other for other in self.found.get("done", []) if other != name]
        self.put("done", done)
        self.add(name, rows)
        self.put("done", [*done, name])

    def add(self, name: str, rows: Iterable[Row]) -> None:
        """Rows, one by one as they are measured."""
        kept: list[Row] = []
        for row in rows:
            tqdm.write(f"{name}: {json.dumps(row)}")
            kept.append(row)
            self.put(name, kept)
