# SPDX-License-Identifier: Apache-2.0
"""A part of the model sweep in every test run: `python -m tests.conformance.models` is the whole.

Each architecture runs the first checks, and two more of the list, which differ from one to the
next.
"""

import pytest

from .cases import NOT_APPLICABLE, OK, judge
from .checks import CHECKS
from .systems import SYSTEMS
from .zoo import DIFFUSERS, PLAIN, zoo

ZOO = zoo()
ALWAYS = ("forward", "backward", "inference_mode", "unwrap")
OTHERS = [name for name in CHECKS if name not in ALWAYS]
TRANSFORMERS = """
    gpt2 gptj codegen gpt_neox opt bloom llama mistral mixtral qwen2 qwen3 qwen2_moe gemma gemma2
    gemma3_text phi phi3 falcon stablelm starcoder2 olmo olmo2 cohere granite persimmon biogpt mpt
    xglm mamba gpt_neo bert roberta electra camembert albert mpnet roformer deberta deberta-v2
    xlm-roberta distilbert t5 bart mbart marian pegasus m2m_100 vit deit dinov2 beit convnext resnet
    swin segformer whisper wav2vec2 clip afmoe jamba
"""
# SHiRA's is in the sweep only, which has a process for each model, and in hook/test_sparse.py: PEFT
# never frees its weights after a forward, plain ones either, so that their donors stay.
ADAPTERS = [f"peft-{kind}Config" for kind in ("Lora", "LoHa", "Frod")]
NAMES = [*PLAIN, *TRANSFORMERS.split(), *DIFFUSERS, *ADAPTERS, "peft-LoraConfig-experts"]


@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name):
    place = NAMES.index(name)
    others = {OTHERS[(2 * place + i) % len(OTHERS)] for i in range(2)}
    built, verdicts = ZOO[name](), {}
    for check in (*ALWAYS, *others):
        for _, verdict, reason in judge(built, check, [SYSTEMS["distorch"]]):
            assert verdict in (OK, NOT_APPLICABLE), f"{check}: {reason}"
            verdicts[check] = verdict
    assert verdicts["forward"] == verdicts["backward"] == verdicts["unwrap"] == OK


def test_there_are_many():
    assert len(ZOO) >= 300
