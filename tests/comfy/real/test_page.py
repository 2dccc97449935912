# SPDX-License-Identifier: Apache-2.0
"""Our nodes in ComfyUI's own web page: bars, presets, saved workflows, examples, help pages."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: it drives the browser")

from tests.comfy.real import page as pages
from tests.comfy.real.client import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "comfyui-distorch" / "example_workflows").glob("*.json"))
WIDGETS = """(type) => Object.fromEntries(
  app.graph.findNodesByType(type)[0].widgets.map((widget) => [widget.name, widget.value]))"""

NATURAL = """(type) => {
  const picture = app.graph.findNodesByType(type)[0].distorchBar;
  return picture.naturalWidth / picture.naturalHeight;
}"""


@pytest.fixture(scope="module")
def page_host(base):
    import os

    if pages.BROWSER is None:
        pytest.skip("no Chromium is installed")
    pytest.importorskip("comfyui_frontend_package", reason="ComfyUI's web page is not installed")
    with pages.host_with_page(Path(os.environ["COMFYUI_DIR"]), base) as started:
        yield started


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def page(page_host, request):
    with pages.opened(page_host, vue=request.param) as opened:
        yield opened
        assert [error for error in opened.errors if "comfyui-distorch" in error] == []


@pytest.fixture(scope="module")
def ran(page):
    """What the bars said while the workflow ran."""
    page.load(pages.workflow())
    return page.run()


@pytest.mark.tiny_flux
def test_the_bar_tells_what_happens(ran):
    said = [text for kind, text in ran if kind == "DistributeModel"]
    assert "ring" in said[0]  # it is loaded
    assert any(re.search(r"cpu->sim:0 [0-9.]+ [MG]B/s", text) for text in said[1:])
    assert len(said) >= 3
    ((_, report),) = [bar for bar in ran if bar[0] == "DistributionReport"]
    assert "sim:0 (compute)" in report


@pytest.mark.tiny_flux
@pytest.mark.parametrize("kind", ["DistributeModel", "DistributionReport"])
def test_the_bar_on_the_screen_has_the_shares_that_were_measured(page, ran, kind):
    page.tab.wait_for_timeout(500)
    shown = page.bar_of(kind)
    (last,) = [text for found, text in page.ask(pages.BARS) if found == kind]
    shares = [float(share) / 100 for share in re.findall(r", ([0-9.]+)%", last)]
    row = [shown.getpixel((x, shown.height // 6)) for x in range(shown.width)]
    bright = [pixel for pixel in row if max(pixel) - min(pixel) > 60]  # colours, without the edge
    counted = [n / len(bright) for _, n in Counter(bright).most_common(3)]
    assert sorted(counted) == pytest.approx(sorted(shares), abs=0.03)
    assert shown.width > 120  # it can be read
    drawn = page.ask(NATURAL, kind)
    assert shown.width / shown.height == pytest.approx(drawn, rel=0.03)  # not cut, not stretched


@pytest.mark.tiny_flux
def test_a_preset_fills_in_the_spec(page, ran):
    offered = page.host.get("/object_info/DistributeModel")["DistributeModel"]
    presets = offered["input"]["required"]["spec"][1]["presets"]
    before = page.ask(WIDGETS, "DistributeModel")
    for title, spec in presets.items():
        page.ask(
            """(title) => app.graph.findNodesByType("DistributeModel")[0].widgets
                 .find((widget) => widget.name === "preset").callback(title)""",
            title,
        )
        after = page.ask(WIDGETS, "DistributeModel")
        assert after == {**before, "spec": spec}
    assert len(presets) >= 4


@pytest.mark.tiny_flux
def test_what_is_saved_and_sent_is_the_workflow_alone(page, ran):
    graph = pages.workflow()
    page.load(graph)
    page.run()
    saved = page.ask("() => app.graph.serialize()")
    (node,) = [node for node in saved["nodes"] if node["type"] == "DistributeModel"]
    assert node["widgets_values"] == [
        graph["2"]["inputs"]["spec"], "default", "interleaved", "4mb", "as stored",
    ]  # fmt: skip
    sent = page.ask("async () => (await app.graphToPrompt()).output")
    assert "preset" not in sent["2"]["inputs"]
    assert "distorch_bar" not in sent["2"]["inputs"]
    page.ask("(saved) => app.loadGraphData(saved)", saved)
    again = page.ask(WIDGETS, "DistributeModel")
    assert [again[name] for name in graph["2"]["inputs"] if name != "model"] == node[
        "widgets_values"
    ]


@pytest.mark.tiny_flux
def test_a_node_in_a_subgraph_has_its_bar(page):
    page.load(pages.workflow())
    if not page.ask("() => !!app.graph.convertToSubgraph"):
        pytest.skip("this web page has no subgraphs")
    page.ask("() => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(2)])); }")
    said = page.run()
    assert any(kind == "DistributeModel" and "ring" in text for kind, text in said)


@pytest.mark.tiny_flux
def test_a_model_that_a_program_has_loaded(page):
    """The host keeps what it made for a prompt without a page."""
    graph = pages.workflow()
    page.host.run(graph)
    graph["5"]["inputs"]["seed"] = 7  # sampled anew, with the model that is there
    page.load(graph)
    said = page.run()
    assert any(kind == "DistributeModel" and "stalls" in text for kind, text in said)


@pytest.mark.tiny_flux
def test_a_node_that_has_another_number_now(page):
    graph = pages.workflow()
    page.load(graph)
    page.run()
    graph["22"] = graph.pop("2")
    graph["2"] = {**graph["22"], "inputs": {**graph["22"]["inputs"], "spec": "cpu,*"}}
    graph["5"]["inputs"] |= {"model": ["22", 0], "seed": 8}
    graph["6"]["inputs"]["model"] = ["22", 0]
    page.load(graph)
    page.run()
    bars = "(id) => app.graph.getNodeById(id).distorchBar?.alt"
    assert "stalls" in page.ask(bars, 22)
    assert page.ask(bars, 2) is None


@pytest.mark.tiny_flux
def test_a_model_that_was_freed(page, ran):
    page.load(pages.workflow())
    page.run()
    page.host.free(cache=False)
    page.tab.wait_for_timeout(500)
    (said,) = [text for kind, text in page.ask(pages.BARS) if kind == "DistributeModel"]
    assert "at rest" in said


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_open(page, path):
    saved = json.loads(path.read_text())
    page.ask("(saved) => app.loadGraphData(saved)", saved)
    types = {node["type"] for node in saved["nodes"]}
    known = page.ask("() => Object.keys(LiteGraph.registered_node_types)")
    assert types <= {*known, "Note", "MarkdownNote"}
    opened = {node["id"]: node for node in page.ask("() => app.graph.serialize()")["nodes"]}
    assert opened.keys() == {node["id"] for node in saved["nodes"]}
    for node in saved["nodes"]:
        assert opened[node["id"]].get("widgets_values", []) == node.get("widgets_values", [])


@pytest.mark.parametrize("name", ["DistributeModel", "DistributionReport"])
def test_help_pages_are_found(page, name):
    text = page.ask(
        """async (name) => {
          const answer = await fetch(`/extensions/comfyui-distorch/docs/${name}.md`);
          return answer.ok ? await answer.text() : String(answer.status);
        }""",
        name,
    )
    assert text.startswith("# Distrib")
