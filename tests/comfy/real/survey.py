# SPDX-License-Identifier: Apache-2.0
"""python -m tests.comfy.real.survey COMFYUI_DIR [--packs DIR]: every node that changes a model.

Takes each node that has a MODEL as input and as output, of ComfyUI and of the packs in DIR, and runs
it three times: behind a loader of ours, behind Distribute Model, and in front of it. The image must
be that of the same node behind ComfyUI's own loader without dynamic VRAM. Prints a table, and ends
with 1 if one was another, or failed in any way but a refusal of ours.

Inputs get their defaults, the first of their choices, or what the small workflow has. A node that
needs more is left out, as is one that fails behind ComfyUI's own loader.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.comfy.real import graphs as g
from tests.comfy.real.client import HERE, GraphError, Host, base_of, command, link_pack

SPEC = "sim:0,10mb;sim:1,5mb;cpu,*"
# What the small workflows can give to a node, by type.
GIVEN = {
    "LATENT": ["latent", 0], "CONDITIONING": ["text", 0], "IMAGE": ["picture", 0],
    "CLIP": ["checkpoint", 1], "VAE": ["checkpoint", 2], "MODEL": ["other", 0],
    "MASK": ["mask", 0], "SIGMAS": ["sigmas", 0],
}  # fmt: skip
PLACES = ("our loader", "Distribute in front", "Distribute behind")
Change = Callable[[g.Graph, g.Link], g.Link]  # adds nodes behind a model, gives the last one's
FAILS = "ComfyUI's own loader fails, too"
UNFIT = "TorchCompile"  # the simulated device has no compiler


def workflow(kind: str) -> g.Graph:
    """Three steps of a small FLUX or SD1.5 with text and negative text."""
    wide = 4096 if kind == "flux" else 768
    loader = g.node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
    graph = {
        "checkpoint": g.node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "other": loader if kind == "flux" else g.node(
            "CheckpointLoaderSimple", ckpt_name="sd15.safetensors"
        ),
        "load": dict(loader) if kind == "flux" else g.node(
            "CheckpointLoaderSimple", ckpt_name="sd15.safetensors"
        ),
        "text": g.node("TestConditioning", seed=1, tokens=16, width=wide, pooled=768),
        "bad": g.node("TestConditioning", seed=2, tokens=16, width=wide, pooled=768),
        "picture": g.node("TestImage", seed=1, size=64),
        "mask": g.node("SolidMask", value=1.0, width=64, height=64),
    }  # fmt: skip
    return g.sampled(
        graph, ["load", 0], positive=["text", 0], negative=["bad", 0], cfg=3.0, size=64
    )


def inputs_of(node: dict[str, Any]) -> dict[str, Any] | None:
    """Values for its required inputs but the first MODEL; None if it needs what is not there."""
    found: dict[str, Any] = {}
    first = True
    for name, declared in node["input"].get("required", {}).items():
        kind, options = declared[0], declared[1] if len(declared) > 1 else {}
        if kind == "MODEL" and first:
            first = False
        elif "default" in options:
            found[name] = options["default"]
        elif isinstance(kind, list) and kind:
            found[name] = kind[0]
        elif kind == "COMBO" and options.get("options"):
            found[name] = options["options"][0]
        elif isinstance(kind, str) and kind in GIVEN:
            found[name] = GIVEN[kind]
        else:
            return None
    return None if first else found


def through(kind: str, change: Change, place: str | None) -> g.Graph:
    """The workflow with a change behind ComfyUI's own loader (None), or at a place of ours."""
    graph = workflow(kind)
    if place == "our loader":
        source = graph["load"]
        graph["load"] = g.node(
            f"{source['class_type']}DisTorch2MultiGPU", **source["inputs"], virtual_vram_gb=4.0,
            compute_device="sim:0", donor_device="cpu", expert_mode_allocations=SPEC,
            eject_models=False,
        )  # fmt: skip
    model: g.Link = ["load", 0]
    if place == "Distribute in front":
        graph["placed"] = g.node("DistributeModel", model=model, spec=SPEC)
        model = ["placed", 0]
    model = change(graph, model)
    if place == "Distribute behind":
        graph["placed"] = g.node("DistributeModel", model=model, spec=SPEC)
        model = ["placed", 0]
    for part in ("sample", "figures"):
        graph[part]["inputs"]["model"] = model
    used = {link[0] for part in graph.values() for link in part["inputs"].values()
            if isinstance(link, list) and len(link) == 2}  # fmt: skip
    ends = {"hash", "figures"}
    return {key: part for key, part in graph.items() if key in used | ends}


def with_node(name: str, node: dict[str, Any]) -> Change:
    """The change that one node makes."""
    takes = next(key for key, d in node["input"]["required"].items() if d[0] == "MODEL")
    values = inputs_of(node)
    assert values is not None

    def change(graph: g.Graph, model: g.Link) -> g.Link:
        graph["node"] = g.node(name, **{takes: model}, **values)
        return ["node", node["output"].index("MODEL")]

    return change


def outcome(host: Host, graph: g.Graph, wanted: str | None) -> tuple[str, str]:
    """(digest or "", what is to be said of it)."""
    try:
        result = g.Result.of(host.run(graph, timeout=120))
    except GraphError as error:
        last = error.detail[-1][1] if isinstance(error.detail, list) else error.detail
        said = str(last.get("exception_message", last)).strip().splitlines()[0]
        return "", f"refused: {said}" if "distorch" in str(last.get("exception_type")) else said
    except AssertionError:
        return "", "not finite"
    if wanted is not None and result.digest != wanted:
        return "", "ANOTHER IMAGE"
    if wanted is not None and "measured" not in result.model:
        return "", "NOT PLACED"
    return result.digest, "same"


def compared(hosts: dict[str, Host], kind: str, change: Change) -> list[str]:
    """How it went at each place with each host. Only what went wrong if ComfyUI's own loader fails."""
    digest, said = outcome(hosts["static"], through(kind, change, None), None)
    if not digest:
        return [f"{FAILS}: {said}"]
    return [
        outcome(host, through(kind, change, place), digest)[1]
        for host in hosts.values() for place in PLACES
    ]  # fmt: skip


@contextmanager
def running(comfyui: Path, base: Path, packs: Path | None) -> Iterator[dict[str, Host]]:
    """Two hosts with these packs, without and with dynamic VRAM."""
    for pack in packs.iterdir() if packs else ():
        link_pack(base, pack)
    serve, memory = HERE / "serve_sim.py", {"DISTORCH_SIM_MEMORY": str(1 << 30)}
    dynamic = ("--enable-dynamic-vram", "--disable-pinned-memory")
    with (
        Host(comfyui, base, serve=serve, environment=memory) as one,
        Host(comfyui, base, serve=serve, environment=memory, options=dynamic) as other,
    ):
        yield {"static": one, "dynamic": other}


def summed(rows: list[list[str]]) -> int:
    """Prints how many cells say what; 1 if one is neither the same nor refused by us."""
    counts = Counter(cell.split(":")[0] for row in rows for cell in row[3:])
    print(f"{len(rows)} rows:", ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    bad = [cell for row in rows for cell in row[3:] if not cell.startswith(("same", "refused"))]
    return int(bool(bad))


def survey(hosts: dict[str, Host], packs: tuple[str, ...]) -> list[list[str]]:
    """Rows: node, pack, and how it went at each place with each host."""
    static = hosts["static"]
    info = static.get("/object_info")
    rows = []
    for name, node in sorted(info.items()):
        module = node.get("python_module", "")
        pack = module.split(".")[1] if module.startswith("custom_nodes.") else "ComfyUI"
        if pack not in ("ComfyUI", *packs) or UNFIT in name or "MODEL" not in node["output"]:
            continue
        if inputs_of(node) is None:
            continue
        for kind in ("flux", "sd15"):
            cells = compared(hosts, kind, with_node(name, node))
            if not cells[0].startswith(FAILS):
                rows.append([name, pack, kind, *cells])
                print(" | ".join(rows[-1]), flush=True)
                break
    return rows


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--packs", type=Path, help="a folder with node packs")
    given = parser.parse_args()
    packs = tuple(sorted(entry.name for entry in given.packs.iterdir())) if given.packs else ()
    with base_of(given) as base, running(given.comfyui, base, given.packs) as hosts:
        return summed(survey(hosts, packs))


if __name__ == "__main__":
    sys.exit(main())
