# SPDX-License-Identifier: Apache-2.0
"""The script that shows a report on its node, in a host that is only pretended."""

import json
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "distorch" / "comfy" / "web" / "distorch.js"
NODE = shutil.which("node")


@pytest.mark.skipif(
    NODE is None, reason="node is not installed: it runs the script of the web page"
)
def test_the_picture_of_a_report_is_drawn_on_its_node(tmp_path):
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "scripts").mkdir()
    app = "export const app = { registerExtension: (it) => (globalThis.extension = it) };"
    (tmp_path / "scripts" / "app.js").write_text(app)
    (tmp_path / "extensions" / "distorch").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "extensions" / "distorch")
    shutil.copy(Path(__file__).parent / "web" / "report_node.mjs", tmp_path)
    done = subprocess.run(
        [NODE, "report_node.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["early"] == 0
    assert found["drawn"] == [[4, 40, 300, 75]]  # as wide as the node, in the picture's proportion
    assert found["size"] == [308, 75]
    assert found["widgets"] == 1
    assert found["grown"] == [250, 100]  # as the host computes it, once the picture is there
    assert found["redraws"] == 4  # two reports, two pictures that came
    kind, _, svg = found["address"].partition(",")
    assert kind == "data:image/svg+xml;charset=utf-8"
    assert urllib.parse.unquote(svg) == "<svg>ü#%</svg>"


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
