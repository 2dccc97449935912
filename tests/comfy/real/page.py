# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's web page in a headless browser, by Playwright and a Chromium that is installed.

python -m tests.comfy.real.page COMFYUI_DIR FILE.png [--base DIR] makes the picture of
docs/comfyui.md: a workflow that has just run, with its bars.
"""

from __future__ import annotations

import io
import itertools
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.comfy.real import graphs as g
from tests.comfy.real.client import HERE, Host, base_of, command

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
# Of all nodes, those in subgraphs, too: [type, what its bar says].
BARS = """() => {
  const found = [];
  const look = (graph) => graph._nodes.forEach((node) => {
    if (node.distorchBar) found.push([node.type, node.distorchBar.alt]);
    if (node.subgraph) look(node.subgraph);
  });
  look(app.rootGraph ?? app.graph);
  return found;
}"""


_size = itertools.count(100)


def workflow(steps: int = 12) -> g.Graph:
    """A small FLUX, Distribute Model, a sampler and a report. The web page wants numbers as ids.

    Each one has a spec of its own: what the host has done before it does not do again, and nothing
    would be shown.
    """
    spec = f"sim:0,{next(_size) / 10:g}mb;sim:1,5mb;cpu,*"
    return {
        "1": g.node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
        "2": g.node(
            "DistributeModel", model=["1", 0], spec=spec, compute_device="default",
            order="interleaved", prefetch="4mb", lora_precision="as stored",
        ),
        "3": g.node("TestConditioning", seed=1, tokens=16, width=4096, pooled=768),
        "4": g.node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": g.node(
            "KSampler", model=["2", 0], positive=["3", 0], negative=["3", 0],
            latent_image=["4", 0], seed=1, steps=steps, cfg=1.0, sampler_name="euler",
            scheduler="simple", denoise=1.0,
        ),
        "6": g.node("DistributionReport", model=["2", 0], after=["5", 0]),
    }  # fmt: skip


def host_with_page(comfyui: Path, base: Path) -> Host:
    """ComfyUI on two simulated devices, with its web page."""
    environment = {"DISTORCH_SIM_MEMORY": str(256 << 20)}
    return Host(comfyui, base, serve=HERE / "serve_sim.py", environment=environment, page=True)


class Page:
    """The web page of a host, in a tab. `errors` are what its scripts raised, and where."""

    def __init__(self, host: Host, tab: Any) -> None:
        self.host, self.tab = host, tab
        self.errors: list[str] = []
        tab.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack}"))

    def open(self, *, vue: bool) -> None:
        """Loads the page. `vue`: nodes are drawn by its newer way ("Nodes 2.0")."""
        self.host.post("/settings", {
            "Comfy.VueNodes.Enabled": vue, "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False,
        })  # fmt: skip
        self.tab.goto(f"http://127.0.0.1:{self.host.port}/")
        self.tab.wait_for_function("!!window.app?.extensionManager", timeout=120_000)
        self.tab.wait_for_function("!!LiteGraph.registered_node_types.DistributeModel")
        self.tab.wait_for_timeout(1000)

    def load(self, graph: g.Graph) -> None:
        """Opens a workflow in the API's form."""
        self.tab.evaluate("(graph) => app.loadApiJson(graph, 'distorch')", graph)

    def ask(self, script: str, *arguments: Any) -> Any:
        """The value of a script in the page."""
        return self.tab.evaluate(script, *arguments)

    def run(self, timeout: float = 120) -> list[list[str]]:
        """Presses Run; what the bars said until the report came: [type, text], each once."""
        self.ask("() => app.queuePrompt(0)")
        said: list[list[str]] = []
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            said += [bar for bar in self.ask(BARS) if bar not in said]
            if any(kind == "DistributionReport" for kind, _ in said):
                return said
            self.tab.wait_for_timeout(100)
        raise TimeoutError(f"no report in {timeout} s; the bars said {said}")

    def bar_of(self, kind: str) -> Image.Image:
        """The bar as it is on the screen, on the node of that type."""
        index = [found for found, _ in self.ask(BARS)].index(kind)
        shown = self.tab.locator("img.distorch-bar").nth(index).screenshot()
        return Image.open(io.BytesIO(shown)).convert("RGB")


@contextmanager
def opened(host: Host, *, vue: bool) -> Iterator[Page]:
    """A page in a browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        # Without a sandbox of its own it runs in containers, too. It opens nothing but the host.
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            page = Page(host, browser.new_page(viewport={"width": 1900, "height": 700}))
            page.open(vue=vue)
            yield page
        finally:
            browser.close()


_PLACES = {
    "1": (20, 40, 250), "3": (20, 170, 250), "4": (20, 370, 250), "2": (300, 40, 380),
    "5": (710, 40, 230), "6": (970, 40, 260),
}  # fmt: skip


def _picture(page: Page, path: Path) -> None:
    """All nodes beside each other, as small as the page allows."""
    page.tab.set_viewport_size({"width": 1220, "height": 520})
    page.load(workflow())
    page.run()
    page.ask(
        """(places) => {
          for (const [id, [x, y, width]] of Object.entries(places)) {
            const node = app.graph.getNodeById(id);
            node.pos = [x, y];
            node.setSize([width, node.computeSize()[1]]);
          }
          Object.assign(app.canvas.ds, { scale: 0.9, offset: [60, 90] });
          app.canvas.setDirty(true, true);
        }""",
        _PLACES,
    )
    page.tab.wait_for_timeout(6000)  # until "Job completed" is gone
    shown = Image.open(io.BytesIO(page.tab.screenshot())).convert("RGB")
    shown.quantize(128).save(path, optimize=True)


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    with (
        base_of(given) as base,
        host_with_page(given.comfyui, base) as host,
        opened(host, vue=True) as page,
    ):
        _picture(page, given.picture)


if __name__ == "__main__":
    main()
