# SPDX-License-Identifier: Apache-2.0
"""python -m tests.comfy.real.prompts COMFYUI_DIR [--prompts 200]: one prompt after another.

Each takes another model, loader, LoRA and strength, or ejects, or frees memory, as a seed says. Its
image must be that of ComfyUI's own loader. Every 20 prompts everything is freed, and what the host
still holds is measured. In the last quarter it must hold no more than in the second.
"""

from __future__ import annotations

import random
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.comfy.real import graphs as g
from tests.comfy.real.client import HERE, Host, base_of, command

MIB = 1 << 20
ROUND = 20  # prompts
MAY_GROW = 24 * MIB  # holes in malloc's heap
FILES = ("flux.safetensors", "flux2.safetensors", "flux-q.safetensors")
LORAS = ("flux_a.safetensors", "flux_b.safetensors")
SPECS = ("sim:0,10mb;cpu,*", "sim:0,0b;sim:1,10mb;cpu,*", "sim:0,20mb;sim:1,5mb;disk,*", "auto")
KINDS = ("stock", "ours", "eject", "distribute", "behind", "device", "report")


def stock(file: str) -> dict[str, object]:
    return g.node("UNETLoader", unet_name=file, weight_dtype="default")


def graph(kind: str, file: str, loras: g.Loras, spec: str, seed: int) -> g.Graph:
    """One prompt, whose image depends on the file, the LoRAs and the seed alone."""
    made = stock(file)
    if kind in ("ours", "eject", "report"):
        made = g.node(
            "UNETLoaderDisTorch2MultiGPU", unet_name=file, weight_dtype="default",
            compute_device="sim:0", virtual_vram_gb=0.01, donor_device="sim:1",
            expert_mode_allocations="" if spec == "auto" else spec, eject_models=kind == "eject",
        )  # fmt: skip
    elif kind == "device":
        made = g.node("UNETLoaderMultiGPU", unet_name=file, weight_dtype="default", device="sim:1")
    found = g.flux(made, *loras, seed=seed)
    if kind in ("distribute", "behind"):
        placed = ["load", 0] if kind == "distribute" or not loras else [f"lora{len(loras) - 1}", 0]
        for node in found.values():
            node["inputs"].update(
                {name: ["placed", 0] for name, link in node["inputs"].items() if link == placed}
            )
        found["placed"] = g.node("DistributeModel", model=placed, spec=spec)
    if kind == "report":
        model = found["sample"]["inputs"]["model"]
        found["report"] = g.node("DistributionReport", model=model, after=["sample", 0])
    return found


def wishes(
    rng: random.Random, kinds: Sequence[str]
) -> Iterator[tuple[str, str, g.Loras, str, int]]:
    """Without end."""
    while True:
        names = rng.sample(LORAS, rng.randrange(len(LORAS) + 1))
        loras = tuple((name, rng.choice((-0.5, 0.3, 0.8))) for name in names)
        yield rng.choice(kinds), rng.choice(FILES), loras, rng.choice(SPECS), rng.randrange(2)


def held(host: Host) -> dict[str, list[int]]:
    """Bytes in use on the simulated devices ("used") and in the heap, and Python's objects."""
    look = {
        "a": g.node("TestConditioning", seed=1, tokens=1, width=1, pooled=1),
        "used": g.node("TestUsed", after=["a", 0]),
    }
    found: dict[str, list[int]] = host.run(look)["used"]
    return found


def resident(host: Host) -> int:
    """Bytes of the process that are no file's, with the holes in its heap."""
    status = Path(f"/proc/{host.process.pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def run(host: Host, prompts: int, seed: int, kinds: Sequence[str]) -> list[str]:
    """What went wrong."""
    rng, wanted, wrong, memory = random.Random(seed), {}, [], []
    for number, (kind, file, loras, spec, noise) in enumerate(wishes(rng, kinds), start=1):
        key = file, loras, noise
        if key not in wanted:
            wanted[key] = g.Result.of(host.run(graph("stock", file, loras, spec, noise))).digest
        if g.Result.of(host.run(graph(kind, file, loras, spec, noise))).digest != wanted[key]:
            wrong.append(f"prompt {number} ({kind}, {file}, {loras}, {spec}): another image")
        if rng.random() < 0.1:
            host.post("/free", {"unload_models": True, "free_memory": rng.random() < 0.5})
        if number % ROUND == 0:
            host.free(cache=True)
            found = held(host)
            if any(found["used"]):
                wrong.append(f"after prompt {number} {found['used']} bytes are left on the devices")
            memory.append(found["heap"][0])
            print(
                f"{number} prompts: {memory[-1] / MIB:.1f} MiB in use, {found['objects'][0]} "
                f"objects, {resident(host) / MIB:.1f} MiB resident", flush=True,
            )  # fmt: skip
        if number >= prompts:
            break
    quarter = max(1, len(memory) // 4)
    grown = statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])
    if grown > MAY_GROW:
        wrong.append(f"memory grew by {grown / MIB:.1f} MiB")
    return wrong


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of prompts")
    parser.add_argument("--static", action="store_true", help="without dynamic VRAM")
    given = parser.parse_args()
    with base_of(given) as base:
        options = () if given.static else ("--enable-dynamic-vram", "--disable-pinned-memory")
        memory = {"DISTORCH_SIM_MEMORY": str(96 * MIB)}
        with Host(
            given.comfyui, base, options=options, serve=HERE / "serve_sim.py", environment=memory
        ) as host:
            wrong = run(host, given.prompts, given.seed, given.kinds)
    print("\n".join(wrong) or "every image was right, and nothing grew")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
