# SPDX-License-Identifier: Apache-2.0
"""Kinds of PEFT adapters in one small model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..checks import Built
from .transformers_models import build as build_transformers

_LLAMA = "llama", "LlamaForCausalLM"
_TARGETS = ["q_proj", "v_proj", "down_proj"]
_KINDS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "init_lora_weights": False},
    "LoraConfig-dora": {"r": 2, "use_dora": True},
    "LoraConfig-rslora": {"r": 2, "use_rslora": True, "init_lora_weights": False},
    "LoraConfig-experts": {
        "r": 2,
        "init_lora_weights": False,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "LoHaConfig": {"r": 2, "init_weights": False},
    "LoKrConfig": {"r": 2, "init_weights": False},
    "AdaLoraConfig": {"init_r": 4, "total_step": 10, "init_lora_weights": False},
    "IA3Config": {"feedforward_modules": ["down_proj"], "init_ia3_weights": False},
    "OFTConfig": {"oft_block_size": 8, "init_weights": False},
    "BOFTConfig": {"boft_block_size": 4, "init_weights": False},
    "VeraConfig": {"r": 2, "init_weights": False},
    "FourierFTConfig": {"n_frequency": 16, "init_weights": False},
    "HRAConfig": {"r": 2, "init_weights": False},
    "ShiraConfig": {"r": 2, "init_weights": False},  # its deltas are sparse tensors, as FRoD's
    "FrodConfig": {"sparse_rate": 0.1, "progressbar": False},
    "RandLoraConfig": {"r": 2, "init_weights": False},
    "MissConfig": {"r": 2, "init_weights": False},
    "C3AConfig": {"block_size": 4, "init_weights": False},
    "VBLoRAConfig": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "WaveFTConfig": {"n_frequency": 16, "init_weights": False},
    "GraloraConfig": {"r": 4, "gralora_k": 2, "init_weights": False},
    "RoadConfig": {"variant": "road_1", "group_size": 4, "init_weights": False},
    "DeloraConfig": {"r": 2, "init_weights": False},
    "OSFConfig": {"effective_rank": 2},
    "AdamssConfig": {"r": 2},
    "BeftConfig": {},
    "LilyConfig": {"r": 2},
    "PveraConfig": {"r": 2},
    "GloraConfig": {"r": 2},
    "UniLoraConfig": {"r": 2},
    "HiraConfig": {"r": 2},
    "TinyLoraConfig": {"r": 2},
    "PsoftConfig": {"r": 2},
    "PeanutConfig": {"r": 2},
    "DeftConfig": {"r": 2},
    "LNTuningConfig": {},
    "PrefixTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PromptTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
}


def build(kind: str, settings: dict[str, Any]) -> Built:
    import peft

    experts = "target_parameters" in settings
    base = build_transformers(*(("mixtral", "MixtralForCausalLM") if experts else _LLAMA))
    name = kind.split("-", maxsplit=1)[0]
    targets = {"target_modules": _TARGETS} if "task_type" not in settings and settings else {}
    torch.manual_seed(1)
    model = peft.get_peft_model(base.module, getattr(peft, name)(**targets, **settings))
    return Built(model.eval(), base.inputs)


PEFT = {f"peft-{kind}": partial(build, kind, settings) for kind, settings in _KINDS.items()}
