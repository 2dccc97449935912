# SPDX-License-Identifier: Apache-2.0
"""Libraries that a distributed model meets on its first day, and its processes."""

import copy
import gc

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import distorch

from .day_one import batch, chain, offloaded, result, same, width_of

VOCABULARY = 96


@pytest.fixture
def prompt(machine):
    ids = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    return ids.to(machine.device)


def language_model(machine, kind):
    """A tiny language model of transformers with random weights, on the device."""
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": VOCABULARY, "attn_implementation": "eager", "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "gpt2":  # its embedding is tied to its head
        config = GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=64, **options)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **options,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    return model.eval().to(machine.device, machine.dtype)


def distributed(machine, model):
    spec = f"{machine.device},0b;cpu,50%;disk,*"
    return distorch.distribute(copy.deepcopy(model), spec, min_bytes=0, prefetch="64kb")


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_generate(machine, prompt, kind):
    plain = language_model(machine, kind)
    model = distributed(machine, plain)
    for way, options in WAYS.items():
        texts = []
        for module in (plain, model):
            torch.manual_seed(3)
            texts.append(
                module.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, **options
                )
            )
        assert torch.equal(*texts), way
    assert distorch.report(model).ok


def test_peft(machine, prompt):
    """An adapter on a distributed model: trained, switched off, merged and let go of."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    results = []
    plain = language_model(machine, "llama")
    for base in (distributed(machine, plain), plain):
        torch.manual_seed(2)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(base, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(3):
            loss = model(input_ids=prompt, labels=prompt).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        with torch.no_grad():
            found.append(model(prompt).logits)
            with model.disable_adapter():
                found.append(model(prompt).logits)
            found.append(model.merge_and_unload()(prompt).logits)  # writes behind a forward
        results.append(found)
    assert same(*results)
    assert not torch.equal(results[0][3], results[0][4])


def test_another_model_under_accelerate(machine):
    """Two ways of offloading in one program, layer by layer in turn."""
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload

    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain)
    theirs = cpu_offload(copy.deepcopy(plain).cpu(), execution_device=machine.device)
    with torch.no_grad():
        wanted = plain(x)
        for _ in range(2):
            ours, other = x, x
            for mine, layer in zip(model, theirs, strict=True):
                ours, other = mine(ours), layer(other)
            assert torch.equal(ours, wanted)
            assert torch.equal(other, wanted)


class Rows(Dataset):
    """Rows of random numbers. `collecting` workers collect what their parent left as garbage."""

    def __init__(self, width, dtype, collecting=False):
        self.width, self.dtype, self.collecting = width, dtype, collecting

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if self.collecting:
            gc.collect()
        generator = torch.Generator().manual_seed(index)
        return torch.randn(self.width, generator=generator).to(self.dtype)


def loader(machine, **options):
    return DataLoader(
        Rows(width_of(machine), machine.dtype, **options), batch_size=2, num_workers=2,
        multiprocessing_context="fork", pin_memory=machine.type == "cuda", timeout=60,
    )  # fmt: skip


def test_workers_of_a_data_loader_are_forked_behind_a_forward(machine):
    plain = chain(machine)
    model, x = offloaded(machine, plain, "disk"), batch(machine)
    wanted = [result(plain, rows.to(machine.device)) for rows in loader(machine)]
    for _ in range(2):
        result(model, x)
        got = [
            result(model, rows.to(machine.device, non_blocking=True)) for rows in loader(machine)
        ]
        assert same(got, wanted)


def test_a_worker_collects_a_model_that_its_parent_let_go_of(machine):
    """What the child lets go of is its parent's: no copy ends, no thread is there to be joined."""
    plain, x = chain(machine), batch(machine)
    model = offloaded(machine, plain, "disk")
    wanted = result(plain, x)
    gone = offloaded(machine, plain)
    gc.collect()
    gc.disable()
    try:
        gone.itself = [gone]
        result(gone, x)
        del gone
        got = result(model, x)
        assert (
            len(
                [
                    result(model, rows.to(machine.device))
                    for rows in loader(machine, collecting=True)
                ]
            )
            == 6
        )
        assert torch.equal(got, wanted)
    finally:
        gc.enable()
    assert torch.equal(result(model, x), wanted)
