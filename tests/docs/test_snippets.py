# SPDX-License-Identifier: Apache-2.0
"""Every block of code of README and docs runs, and prints what the page says it prints."""

import gc
import logging
import warnings

import pytest

from distorch.testing import sim
from tests.docs.snippets import NOT_RUN, ROOT, parse
from tests.docs.world import World

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("python", "sh", "text")
# Languages of blocks that are not code to run.
DATA = ("{eval-rst}",)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _settings():
    """What a page sets for its process is taken back."""
    with warnings.catch_warnings():
        yield
    logging.getLogger("distorch").setLevel(logging.NOTSET)
    gc.collect()
    sim.synchronize()
    sim.configure(devices=2)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page(page, world, tmp_path, monkeypatch):
    document = parse(page)
    name = "README" if page.parent == ROOT else page.stem
    document.namespace.update(world.enter(name, tmp_path, monkeypatch))
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_no_block_escapes(page):
    """A block whose language is missing or unknown would not be run."""
    fences = [line.strip() for line in page.read_text().splitlines() if "```" in line]
    opened = [fence.removeprefix("```") for fence in fences[::2]]
    assert set(opened) <= {*RUN, *DATA}, page.name
    assert set(fences[1::2]) <= {"```"}


def test_what_is_not_run_is_there():
    """NOT_RUN has no line that no page has."""
    lines = "\n".join(page.read_text() for page in PAGES)
    assert [words for words in NOT_RUN if words not in lines] == []
