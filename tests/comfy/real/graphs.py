# SPDX-License-Identifier: Apache-2.0
"""Graphs for the tests, in the API's form: what is loaded, sampled, hashed and measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Graph = dict[str, dict[str, Any]]
Link = list[Any]
Loras = tuple[tuple[str, float], ...]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One node."""
    return {"class_type": kind, "inputs": inputs}


def old_inputs(kind: str, device: str = "compute_device", **inputs: Any) -> dict[str, Any]:
    """A loader under an old name, with the old inputs as workflows save them."""
    fields = {
        device: "cpu", "virtual_vram_gb": 4.0, "donor_device": "disk",
        "expert_mode_allocations": "", "eject_models": True,
    }  # fmt: skip
    return node(kind, **{**fields, **inputs})


def sampled(
    graph: Graph, model: Link, *, positive: Link, negative: Link | None = None, cfg: float = 1.0,
    seed: int = 1, size: int = 128,
) -> Graph:  # fmt: skip
    """The graph with a sampler, the hash of its latent, and figures of its model."""
    return {
        **graph,
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "sample": node(
            "KSampler", model=model, seed=seed, steps=3, cfg=cfg, sampler_name="euler",
            scheduler="simple", positive=positive, negative=negative or positive,
            latent_image=["latent", 0], denoise=1.0,
        ),
        "hash": node("TestHash", value=["sample", 0]),
        "figures": node("TestFigures", model=model, after=["sample", 0]),
    }  # fmt: skip


def with_loras(graph: Graph, model: Link, loras: Loras) -> Link:
    """Adds LoRA loaders to the graph; the model behind the last one."""
    for index, (name, strength) in enumerate(loras):
        graph[f"lora{index}"] = node(
            "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength
        )
        model = [f"lora{index}", 0]
    return model


def flux(loader: dict[str, Any], *loras: tuple[str, float], seed: int = 1) -> Graph:
    """Three steps of a tiny Flux."""
    graph: Graph = {
        "load": loader,
        "text": node("TestConditioning", seed=1, tokens=16, width=4096, pooled=768),
    }
    model = with_loras(graph, ["load", 0], loras)
    return sampled(graph, model, positive=["text", 0], seed=seed)


def hooked(
    loader: dict[str, Any], part: tuple[str, float], *loras: tuple[str, float], seed: int = 1
) -> Graph:
    """The same with one more LoRA that is on for the positive half of each step."""
    graph = flux(loader, *loras, seed=seed)
    graph["hook"] = node(
        "CreateHookLora", lora_name=part[0], strength_model=part[1], strength_clip=0.0
    )
    graph["part"] = node(
        "ConditioningSetProperties", cond_NEW=["text", 0], strength=1.0,
        set_cond_area="default", hooks=["hook", 0],
    )  # fmt: skip
    graph["sample"]["inputs"] |= {"positive": ["part", 0], "negative": ["text", 0], "cfg": 3.0}
    return graph


def checkpoint(
    loader: dict[str, Any], *, lora: float | None = None, vae: dict[str, Any] | None = None,
    clip: dict[str, Any] | None = None, control: dict[str, Any] | None = None, seed: int = 1,
) -> Graph:  # fmt: skip
    """A picture of a tiny SD1.5 checkpoint: text encoder, ControlNet if given, model and VAE."""
    graph: Graph = {"load": loader}
    model, text = ["load", 0], ["load", 1] if clip is None else ["clip", 0]
    if clip is not None:
        graph["clip"] = clip
    if lora is not None:
        graph["lora"] = node(
            "LoraLoader", model=model, clip=text, lora_name="sd15.safetensors",
            strength_model=lora, strength_clip=lora,
        )  # fmt: skip
        model, text = ["lora", 0], ["lora", 1]
    graph["good"] = node("CLIPTextEncode", clip=text, text="a photograph of a lighthouse")
    graph["bad"] = node("CLIPTextEncode", clip=text, text="blurry")
    positive = ["good", 0]
    if control is not None:
        graph["net"] = control
        graph["hint"] = node("TestImage", seed=3, size=64)
        graph["control"] = node(
            "ControlNetApply", conditioning=positive, control_net=["net", 0], image=["hint", 0],
            strength=0.8,
        )  # fmt: skip
        positive = ["control", 0]
        graph["net_figures"] = node("TestFigures", model=["net", 0], after=["sample", 0])
    graph = sampled(
        graph, model, positive=positive, negative=["bad", 0], cfg=4.0, seed=seed, size=64
    )
    source = ["load", 2] if vae is None else ["vae", 0]
    if vae is not None:
        graph["vae"] = vae
    graph["decode"] = node("VAEDecode", samples=["sample", 0], vae=source)
    graph["hash"]["inputs"]["value"] = ["decode", 0]
    for name, link in (("clip_figures", text), ("vae_figures", source)):
        graph[name] = node("TestFigures", model=link, after=["decode", 0])
    return graph


def encoded(loader, text):
    """A text through the encoder of `loader`."""
    return {
        "load": loader,
        "text": node("CLIPTextEncode", clip=["load", 0], text=text),
        "hash": node("TestHash", value=["text", 0]),
        "figures": node("TestFigures", model=["load", 0], after=["text", 0]),
    }


@dataclass(frozen=True)
class Result:
    """What a run said: the hash of what it made, and measured figures per model."""

    digest: str
    figures: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, shown: dict[str, Any]) -> Result:
        """From the host's answer. Asserts that the output is finite and not constant."""
        assert shown["hash"]["good"] == [True]
        figures = {
            name: json.loads(found["figures"][0])
            for name, found in shown.items()
            if "figures" in found
        }
        return cls(shown["hash"]["hash"][0], figures)

    @property
    def model(self) -> dict[str, Any]:
        """Figures of the diffusion model."""
        return self.figures["figures"]

    def assert_as_planned(self) -> None:
        """Every model of ours is where its plan says, byte for byte."""
        for name, found in self.figures.items():
            if "planned" in found:
                assert found["measured"] == found["planned"], name
                assert found["problems"] == [], name
