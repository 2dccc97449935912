# SPDX-License-Identifier: Apache-2.0
"""python -m tests.comfy.real.wanvideo COMFYUI_DIR PACK: the pack WanVideoWrapper itself.

A small Wan model goes through the pack's own loader and sampler, with its LoRAs, its fp8 and its
block swap. Then the same with our block swap onto RAM and onto another device. Samples must be
those of the pack without any block swap. Prints a table, and ends with 1 if one was another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.comfy.real import graphs as g
from tests.comfy.real.client import HERE, GraphError, Host, base_of, command, link_pack

# 30 blocks and 12 heads are what their loader takes for a model of unknown width.
BLOCKS, WIDTH, INNER, TEXT = 30, 192, 384, 4096
MODEL, LORA = "wan-small.safetensors", "wan-small.safetensors"


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "patch_embedding.weight", (WIDTH, 16, 1, 2, 2)
    yield "patch_embedding.bias", (WIDTH,)
    for name, rows, columns in (
        ("text_embedding.0", WIDTH, TEXT), ("text_embedding.2", WIDTH, WIDTH),
        ("time_embedding.0", WIDTH, 256), ("time_embedding.2", WIDTH, WIDTH),
        ("time_projection.1", 6 * WIDTH, WIDTH), ("head.head", 64, WIDTH),
    ):  # fmt: skip
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)
    yield "head.modulation", (1, 2, WIDTH)
    for block in range(BLOCKS):
        prefix = f"blocks.{block}"
        yield f"{prefix}.modulation", (1, 6, WIDTH)
        for kind in ("weight", "bias"):
            yield f"{prefix}.norm3.{kind}", (WIDTH,)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                yield f"{prefix}.{attention}.{part}.weight", (WIDTH, WIDTH)
                yield f"{prefix}.{attention}.{part}.bias", (WIDTH,)
            for part in ("norm_q", "norm_k"):
                yield f"{prefix}.{attention}.{part}.weight", (WIDTH,)
        for part, rows, columns in (("ffn.0", INNER, WIDTH), ("ffn.2", WIDTH, INNER)):
            yield f"{prefix}.{part}.weight", (rows, columns)
            yield f"{prefix}.{part}.bias", (rows,)


def make_files(models: Path) -> None:
    """A model and a LoRA of noise."""
    generator = torch.Generator().manual_seed(5)

    def noise(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half()

    weights = {
        name: 1 + noise(shape, 0.1) if "norm" in name and name.endswith("weight") else
        noise(shape, 0.05)
        for name, shape in _shapes()
    }  # fmt: skip
    save_file(weights, models / "diffusion_models" / MODEL)
    lora = {}
    for name, tensor in weights.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            lora[f"{key}.lora_A.weight"] = noise((4, tensor.shape[1]), 0.1)
            lora[f"{key}.lora_B.weight"] = noise((tensor.shape[0], 4), 0.1)
    save_file(lora, models / "loras" / LORA)


@dataclass(frozen=True)
class Case:
    """How their loader is asked; `more` are inputs of their sampler."""

    title: str
    base_precision: str = "bf16"
    quantization: str = "disabled"
    lora: str = ""  # "", "merged", "unmerged"
    more: tuple[tuple[str, Any], ...] = ()


CASES = (
    Case("bf16"),
    Case("fp32", "fp32"),
    Case("fp16", "fp16"),
    Case("fp8", quantization="fp8_e4m3fn"),
    Case("fp8 e5m2", quantization="fp8_e5m2"),
    Case("LoRA, merged", lora="merged"),
    Case("LoRA, unmerged", lora="unmerged"),
    Case("fp8, LoRA merged", quantization="fp8_e4m3fn", lora="merged"),
    Case("fp8, LoRA unmerged", quantization="fp8_e4m3fn", lora="unmerged"),
    Case("stays on the device", more=(("force_offload", False),)),
    Case("rope chunked", more=(("rope_function", "comfy_chunked"),)),
)
# What the web page sends of their block swap.
SWAP = {
    "blocks_to_swap": 20, "offload_img_emb": False, "offload_txt_emb": False,
    "use_non_blocking": False, "vace_blocks_to_swap": 0, "prefetch_blocks": 0,
    "block_swap_debug": False,
}  # fmt: skip
# (title, their block swap's inputs or None, the device of ours or None)
SWAPS = (
    ("none", None, None),
    ("theirs", {}, None),
    ("ours, cpu", {}, "cpu"),
    ("ours, text off, too", {"offload_txt_emb": True, "prefetch_blocks": 1}, "cpu"),
    ("ours, by a spec", {"spec": "sim:0,4mb;sim:1,4mb;cpu,*"}, "cpu"),
    ("ours, all blocks", {"blocks_to_swap": 40}, "sim:1"),
)


def workflow(case: Case, swap: dict[str, Any] | None, device: str | None, seed: int) -> g.Graph:
    """Two steps of a small video."""
    ours = "MultiGPU" if device is not None else ""
    loader = {
        "model": MODEL, "base_precision": case.base_precision, "quantization": case.quantization,
        "load_device": "offload_device",
    }  # fmt: skip
    graph: g.Graph = {
        "text": g.node("TestWanText", seed=1),
        "empty": g.node("WanVideoEmptyEmbeds", width=64, height=64, num_frames=5),
    }
    if case.lora:
        graph["lora"] = g.node(
            "WanVideoLoraSelect", lora=LORA, strength=0.7, merge_loras=case.lora == "merged"
        )
        loader["lora"] = ["lora", 0]
    if swap is not None:
        asked = {**SWAP, **swap}
        if device is not None:
            asked["swap_device"] = device
        graph["swap"] = g.node(f"WanVideoBlockSwap{ours}", **asked)
        loader["block_swap_args"] = ["swap", 0]
    if device is not None:
        loader["compute_device"] = "sim:0"
    graph["load"] = g.node(f"WanVideoModelLoader{ours}", **loader)
    sampler = {
        "model": ["load", 0], "image_embeds": ["empty", 0], "text_embeds": ["text", 0],
        "steps": 2, "cfg": 5.0, "shift": 5.0, "seed": seed, "force_offload": True,
        "scheduler": "euler", "riflex_freq_index": 0, **dict(case.more),
    }  # fmt: skip
    if device is not None:
        sampler["compute_device"] = ["load", 1]
    graph["sample"] = g.node(f"WanVideoSampler{ours}", **sampler)
    graph["hash"] = g.node("TestHash", value=["sample", 0])
    graph["fetches"] = g.node("TestFetches", after=["sample", 0])
    return graph


def sampled(host: Host, graph: g.Graph) -> tuple[str, int]:
    """(digest, fetches since the process began), or (what went wrong, -1)."""
    try:
        shown = host.run(graph)
    except GraphError as error:
        last = error.detail[-1][1] if isinstance(error.detail, list) else error.detail
        return str(last.get("exception_message", last)).strip()[:300], -1
    if shown["hash"]["good"] != [True]:
        return "not finite", -1
    return shown["hash"]["hash"][0], shown["fetches"]["fetches"][0]


def compare(host: Host) -> int:
    """Prints the table; how many of ours were not the same.

    On other devices than CUDA their own block swap does not work. Where ours stops at the same
    error, it is theirs.
    """
    wrong = fetches = 0
    for case in CASES:
        expected: dict[int, str] = {}
        theirs: set[str] = set()
        cells = [case.title]
        for title, swap, device in SWAPS:
            said = []
            for seed in (1, 2) if case is CASES[0] else (1,):
                found, now = sampled(host, workflow(case, swap, device, seed))
                moved, fetches = now > fetches, max(now, fetches)
                expected.setdefault(seed, found)
                same = found == expected[seed] and now >= 0
                placed = moved == (device is not None)
                said.append("same" if same and placed else "NOT PLACED" if same else found)
            if swap is None:  # what all others are compared with
                wrong += set(said) != {"same"}
            elif device is None:
                theirs |= {one for one in said if one != "same"}
            elif set(said) == {"same"}:
                said = ["same"]
            elif not set(said) <= theirs:
                wrong += 1
            cells.append(f"{title}: {', '.join(dict.fromkeys(said))}")
        print(" | ".join(cells), flush=True)
    return wrong


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("pack", type=Path, help="a checkout of WanVideoWrapper")
    given = parser.parse_args()
    with base_of(given) as base:
        make_files(base / "models")
        link_pack(base, given.pack)
        environment = {"DISTORCH_SIM_MEMORY": str(1 << 30)}
        serve = HERE / "serve_sim.py"
        with Host(given.comfyui, base, serve=serve, environment=environment) as host:
            return int(compare(host) > 0)


if __name__ == "__main__":
    sys.exit(main())
