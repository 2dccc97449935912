# SPDX-License-Identifier: Apache-2.0
"""What the pages of the documentation take for granted: models, files and repositories.

They have the names that the pages use, and are tiny and random.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from distorch.testing import sim
from tests import tiny_models as tiny
from tests.gguf_files import Q, llama_cpp_tensors, write_gguf
from tests.hub_cache import put

WIDTH = 512  # a square float32 weight of 1 MiB, which leaves the compute device by default


class MyTransformer(nn.Sequential):
    """A module of somebody's own."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def lora_for(module: nn.Module, count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA in PEFT's names for the first linear layers of a module."""
    generator = torch.Generator().manual_seed(seed)
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)][:count]
    found = {}
    for name, layer in layers:
        found[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    return found


class World:
    """Files that are made once, and copied for each page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "hub"
        self.files = folder / "files"
        self.files.mkdir()
        self._own_module()
        self._pipeline()
        self._language_model()

    def _own_module(self) -> None:
        torch.manual_seed(0)
        self.module = MyTransformer()
        values = self.module.state_dict()
        for name in ("weights", "model", "flux1-dev"):
            save_file(values, self.files / f"{name}.safetensors")
        for seed, name in enumerate(("style", "detail", "adapter")):
            save_file(lora_for(self.module, seed=seed), self.files / f"{name}.safetensors")

    def _pipeline(self) -> None:
        saved, _ = tiny.save_pipeline(tiny.wan, self.folder / "wan")
        put(self.cache, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", saved)
        saved, self.picture = tiny.save_pipeline(tiny.flux, self.folder / "flux")
        put(self.cache, "black-forest-labs/FLUX.1-dev", saved)
        from diffusers import FluxTransformer2DModel

        transformer = FluxTransformer2DModel.from_pretrained(saved / "transformer")
        lora = {f"transformer.{k}": v for k, v in lora_for(transformer, count=6).items()}
        save_file(lora, self.folder / "style.safetensors")
        write_gguf(self.files / "flux1-dev-Q8_0.gguf", "flux", transformer.state_dict(), Q.Q8_0)

    def _language_model(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

        sizes: dict[str, Any] = {
            "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        }  # fmt: skip
        saved = tiny.save_language_model(
            Qwen3Config(**sizes), self.folder / "qwen3", tiny.qwen_tokenizer()
        )
        put(self.cache, "Qwen/Qwen3-8B", saved)
        language_model = LlamaForCausalLM(LlamaConfig(**sizes))
        tensors = llama_cpp_tensors(language_model, "llama", language_model.config)
        file = self.files / "qwen3-8b-q8_0.gguf"
        write_gguf(file, "llama", tensors, Q.Q8_0, language_model.config)

    def enter(self, page: str, folder: Path, monkeypatch: Any) -> dict[str, Any]:
        """Makes `folder` the current one, with the files; gives the names that a page may use."""
        shutil.copytree(self.files, folder, dirs_exist_ok=True)
        if page in _OF_PIPELINES:  # their LoRA is one for FLUX
            shutil.copy(self.folder / "style.safetensors", folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        _draw_small(monkeypatch, self.picture)
        sim.configure(devices=2, memory="24gb")
        torch.manual_seed(0)
        model = MyTransformer()
        model.load_state_dict(self.module.state_dict())
        return {
            "MyTransformer": MyTransformer, "config": 4, "model": model, "module": model,
            "x": torch.randn(2, WIDTH, device="sim:0"),
        }  # fmt: skip


_OF_PIPELINES = ("README", "diffusers")


def _draw_small(monkeypatch: Any, picture: dict[str, Any]) -> None:
    """A picture of FLUX is a few pixels wide and takes two steps, unless the caller says more."""
    from diffusers import FluxPipeline

    draw = FluxPipeline.__call__

    def small(self: Any, *arguments: Any, **options: Any) -> Any:
        self.set_progress_bar_config(disable=True)
        return draw(self, *arguments, **{"num_inference_steps": 2, **picture, **options})

    monkeypatch.setattr(FluxPipeline, "__call__", small)
