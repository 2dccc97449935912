# SPDX-License-Identifier: Apache-2.0
"""python -m tests.comfy.real.guests COMFYUI_DIR PACKS: packs that patch a model, with small files.

What the survey cannot run, because a node needs more than its defaults: an IP adapter, an advanced
ControlNet, LoRA loaders of rgthree and Efficiency. Each at the places and with the hosts of the
survey. Also GGUF, whose stock loader is that of ComfyUI-GGUF. Prints a table, and ends with 1 if an
image was another.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.comfy.real import graphs as g
from tests.comfy.real import survey
from tests.comfy.real.client import Host, base_of, command

_CLIP = 768  # numbers of an image's embedding


def make_ip_adapter(models: Path) -> None:
    """An IP adapter for the small SD1.5: keys and values for each of its cross attentions, in the
    order in which the pack counts them.
    """
    generator = torch.Generator().manual_seed(11)
    with safe_open(models / "checkpoints" / "sd15.safetensors", "pt") as checkpoint:
        prefix, suffix = "model.diffusion_model.", "attn2.to_k.weight"
        shapes = {
            name.removeprefix(prefix): tuple(checkpoint.get_slice(name).get_shape())
            for name in checkpoint.keys()  # noqa: SIM118
            if name.startswith(prefix) and name.endswith(suffix)
        }

    def place(name: str) -> tuple[int, int]:
        part, index, *_ = name.split(".")
        return ("input_blocks", "output_blocks", "middle_block").index(part), int(index)

    made = {
        "image_proj.proj.weight": torch.randn(4 * 768, _CLIP, generator=generator) * 0.03,
        "image_proj.proj.bias": torch.zeros(4 * 768),
        "image_proj.norm.weight": torch.ones(768),
        "image_proj.norm.bias": torch.zeros(768),
    }
    for number, name in enumerate(sorted(shapes, key=place)):
        for kind in ("k", "v"):
            noise = torch.randn(shapes[name], generator=generator) * 0.03
            made[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = noise
    (models / "ipadapter").mkdir(exist_ok=True)
    save_file(made, models / "ipadapter" / "ip-small.safetensors")


def _ip_adapter(graph: g.Graph, model: g.Link) -> g.Link:
    graph["embeds"] = g.node("TestEmbeds", seed=1, width=_CLIP)
    graph["no embeds"] = g.node("TestEmbeds", seed=2, width=_CLIP)
    graph["adapter"] = g.node("IPAdapterModelLoader", ipadapter_file="ip-small.safetensors")
    graph["adapted"] = g.node(
        "IPAdapterEmbeds", model=model, ipadapter=["adapter", 0], pos_embed=["embeds", 0],
        neg_embed=["no embeds", 0], weight=1.0, weight_type="linear", start_at=0.0, end_at=1.0,
        embeds_scaling="V only",
    )  # fmt: skip
    return ["adapted", 0]


def _advanced_control_net(graph: g.Graph, model: g.Link) -> g.Link:
    graph["net"] = g.node("ACN_ControlNetLoaderAdvanced", cnet="cn.safetensors")
    graph["apply"] = g.node(
        "ACN_AdvancedControlNetApply_v2", positive=["text", 0], negative=["bad", 0],
        control_net=["net", 0], image=["picture", 0], strength=0.8, start_percent=0.0,
        end_percent=0.7,
    )  # fmt: skip
    graph["sample"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
    return model


def _power_loras(graph: g.Graph, model: g.Link) -> g.Link:
    on = {"on": True, "strength": 0.7, "strengthTwo": None}
    graph["loras"] = g.node(
        "Power Lora Loader (rgthree)", model=model,
        lora_1={**on, "lora": "flux_a.safetensors"}, lora_2={**on, "lora": "flux_b.safetensors"},
    )  # fmt: skip
    return ["loras", 0]


def _lora_stack(graph: g.Graph, model: g.Link) -> g.Link:
    loras = {f"lora_0{i}": name for i, name in enumerate(("flux_a.safetensors", *["None"] * 3), 1)}
    strengths = {f"strength_0{i}": 0.6 for i in range(1, 5)}
    graph["loras"] = g.node(
        "Lora Loader Stack (rgthree)", model=model, clip=["checkpoint", 1], **loras, **strengths
    )
    return ["loras", 0]


def _adapter_and_control_net(graph: g.Graph, model: g.Link) -> g.Link:
    return _advanced_control_net(graph, _ip_adapter(graph, model))


CASES = (
    ("IPAdapterEmbeds", "ComfyUI_IPAdapter_plus", "sd15", _ip_adapter),
    ("ACN_AdvancedControlNetApply_v2", "ComfyUI-Advanced-ControlNet", "sd15", _advanced_control_net),
    ("both of them", "two packs", "sd15", _adapter_and_control_net),
    ("Power Lora Loader (rgthree)", "rgthree-comfy", "flux", _power_loras),
    ("Lora Loader Stack (rgthree)", "rgthree-comfy", "flux", _lora_stack),
)  # fmt: skip


def gguf(hosts: dict[str, Host]) -> list[str]:
    """Ours against ComfyUI-GGUF's own loader with the same decoding, alone and with a LoRA."""
    cells = []
    for loras in ((), (("flux_a.safetensors", 0.8),)):
        theirs = g.node(
            "UnetLoaderGGUFAdvanced", unet_name="flux-q.gguf", dequant_dtype="float32",
            patch_dtype="float32", patch_on_device=False,
        )  # fmt: skip
        ours = g.node(
            "UnetLoaderGGUFDisTorch2MultiGPU", unet_name="flux-q.gguf", compute_device="sim:0",
            virtual_vram_gb=4.0, donor_device="cpu", eject_models=False,
            expert_mode_allocations="sim:0,4mb;sim:1,2mb;cpu,*",
        )  # fmt: skip
        digest, said = survey.outcome(hosts["static"], g.flux(theirs, *loras), None)
        cells += [
            survey.outcome(host, g.flux(ours, *loras), digest)[1] if digest else said
            for host in hosts.values()
        ]
    return cells


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("packs", type=Path, help="a folder with node packs")
    given = parser.parse_args()
    rows = []
    with base_of(given) as base:
        make_ip_adapter(base / "models")
        with survey.running(given.comfyui, base, given.packs) as hosts:
            for name, pack, kind, change in CASES:
                rows.append([name, pack, kind, *survey.compared(hosts, kind, change)])
                print(" | ".join(rows[-1]), flush=True)
            rows.append(["GGUF, alone and with a LoRA", "ComfyUI-GGUF", "flux", *gguf(hosts)])
            print(" | ".join(rows[-1]), flush=True)
    return survey.summed(rows)


if __name__ == "__main__":
    sys.exit(main())
