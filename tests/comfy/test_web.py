# SPDX-License-Identifier: Apache-2.0
"""The script of our nodes in a web page that is only pretended, and their help pages."""

import json
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "distorch" / "comfy" / "web" / "distorch.js"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the script does in a page that is only pretended."""
    if NODE is None:
        pytest.skip("node is not installed: it runs the script of the web page")
    folder = tmp_path_factory.mktemp("page")
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "scripts").mkdir()
    for name, code in {
        "app": "{ registerExtension: (it) => (globalThis.extension = it) }",
        "api": "{ addEventListener: (name, f) => ((globalThis.listeners ??= {})[name] = f) }",
    }.items():
        text = f"export const {name} = (globalThis.{name} = {code});"
        (folder / "scripts" / f"{name}.js").write_text(text)
    (folder / "extensions" / "distorch").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "extensions" / "distorch")
    shutil.copy(Path(__file__).parent / "web" / "nodes.mjs", folder)
    done = subprocess.run(
        [NODE, "nodes.mjs"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_bar_is_shown_on_the_node_that_it_is_for(page):
    kind, _, svg = page["address"].partition(",")
    assert kind == "data:image/svg+xml;charset=utf-8"
    assert urllib.parse.unquote(svg) == "<svg>ü#%</svg>"
    assert page["alt"] == "ü#%"
    assert page["inside"] == "inside"  # a node of a subgraph
    assert page["other"] == 0  # a node of somebody else
    assert page["moved"] == "it is node 9 now"
    assert page["byLink"] == "linked"  # what is linked is not typed into the node


def test_a_report_shows_its_picture_and_keeps_it(page):
    assert page["report"] == ["measured", 1]


def test_the_node_grows_once_for_the_bar(page):
    assert page["before"] == 60  # before the picture is there
    assert page["after"] == 312 * 100 / 320 + 8  # in the picture's proportion, with an edge
    assert page["size"] == [320, 80 + page["after"]]
    assert page["redraws"] == 2  # one picture, one preset


def test_bar_and_presets_are_neither_saved_nor_sent(page):
    assert page["names"] == ["spec", "preset", "distorch_bar"]
    assert page["saved"] == [False, False]
    assert page["sent"] is False


def test_a_preset_is_written_into_the_spec(page):
    assert page["choices"][1:] == ["Half"]
    assert page["spec"] == page["told"] == "cuda:0,50%;cpu,50%"
    assert page["shown"] == page["choices"][0]  # the list is as before


PAGES = SCRIPT.parent / "docs"


def test_our_nodes_have_a_help_page_that_names_every_input(host):
    from distorch.comfy import own_nodes

    assert {page.stem for page in PAGES.glob("*.md")} == set(own_nodes.NODES)
    for name, node in own_nodes.NODES.items():
        page = (PAGES / f"{name}.md").read_text()
        assert page.startswith(f"# {node.TITLE}\n")
        named = set(re.findall(r"^\| \*\*(\w+)\*\* \|", page, re.MULTILINE))
        inputs = {key for part in node.INPUT_TYPES().values() for key in part}
        outputs = set(node.RETURN_NAMES) if node.TITLE == "Distribution Report" else set()
        assert named == inputs | outputs
        for part in node.INPUT_TYPES().values():
            for kind, *rest in part.values():
                choices = [c for c in kind if ":" not in c] if isinstance(kind, list) else []
                assert all(choice in page for choice in choices if choice != "cpu"), rest
