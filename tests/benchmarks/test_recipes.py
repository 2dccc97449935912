# SPDX-License-Identifier: Apache-2.0
"""The recipes of README and docs are what benchmarks/recipes.py computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import _recipe_tables

    yield _recipe_tables
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def rows():
    return json.loads(RESULTS.read_text())["recipes"]


def test_the_program_computes_them_again(tmp_path, rows):
    """One model, which takes seconds."""
    found = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "recipes.py"), "--only", "Qwen3-8B",
         "--json", str(found)],
        check=True, capture_output=True,
    )  # fmt: skip
    again = json.loads(found.read_text())["recipes"]
    assert len(again) == 4
    assert again == [row for row in rows if row["model"].startswith("Qwen3-8B")]


def test_every_recipe_fits(rows):
    assert all(row["fits"] and row["left"] >= 0 for row in rows)


def test_the_page_has_the_table(rows, tables):
    assert tables.markdown(rows) in (ROOT / "docs" / "recipes.md").read_text()


def test_readme_has_the_matrix(rows, tables):
    readme = (ROOT / "README.md").read_text().splitlines()
    lines = tables.matrix(rows).splitlines()
    shown = [line for line in lines if line in readme]
    assert len(shown) >= 6  # the head, its rule, and models
    matrix = readme[readme.index(lines[0]) :]
    assert all(line in lines for line in matrix[: matrix.index("")])
