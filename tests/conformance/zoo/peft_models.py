# SPDX-License-Identifier: Apache-2.0
"""Kinds of PEFT adapters in one small model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..checks import Built
from .transformers_models import build as build_transformers

_TARGETS = ["q_proj", "v_proj", "down_proj"]
_KINDS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "init_lora_weights": False},
    "LoraConfig-dora": {"r": 2, "use_dora": True},
    "LoraConfig-rslora": {"r": 2, "use_rslora": True, "init_lora_weights": False},
    "LoHaConfig": {"r": 2, "init_weights": False},
    "LoKrConfig": {"r": 2, "init_weights": False},
    "AdaLoraConfig": {"init_r": 4, "total_step": 10, "init_lora_weights": False},
    "IA3Config": {"feedforward_modules": ["down_proj"], "init_ia3_weights": False},
    "OFTConfig": {"oft_block_size": 8, "init_weights": False},
    "BOFTConfig": {"boft_block_size": 4, "init_weights": False},
    "VeraConfig": {"r": 2, "init_weights": False},
    "FourierFTConfig": {"n_frequency": 16, "init_weights": False},
    "HRAConfig": {"r": 2, "init_weights": False},
    "LNTuningConfig": {},
    "PrefixTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PromptTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
}


def build(kind: str, settings: dict[str, Any]) -> Built:
    import peft

    base = build_transformers("llama", "LlamaForCausalLM")
    name = kind.split("-", maxsplit=1)[0]
    targets = {"target_modules": _TARGETS} if "task_type" not in settings and settings else {}
    torch.manual_seed(1)
    model = peft.get_peft_model(base.module, getattr(peft, name)(**targets, **settings))
    return Built(model.eval(), base.inputs)


PEFT = {f"peft-{kind}": partial(build, kind, settings) for kind, settings in _KINDS.items()}
