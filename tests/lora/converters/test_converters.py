# SPDX-License-Identifier: Apache-2.0
"""Names that diffusers' own converters know, on tiny models of their families, and the reverse.

What is right is said twice: by the tables, and by the converters themselves. A converter that no
table is for makes `test_every_converter_is_known` fail.
"""

import inspect
import re

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as conversions
from torch import nn

import distorch
from tests.lora.converters.tables import (
    DEFAULT,
    KOHYA,
    PEFT,
    RECIPES,
    Change,
    build,
    layers,
    shape_of,
    swapped,
)

# Tested elsewhere: original U-Nets (test_spellings.py), control LoRAs (test_names_as_found.py), LoKr.
ELSEWHERE = {
    "_convert_non_diffusers_lora_to_diffusers", "_convert_unet_lora_key",
    "_convert_text_encoder_lora_key", "_convert_bfl_flux_control_lora_to_diffusers",
    "_convert_non_diffusers_lokr_to_diffusers", "_convert_non_diffusers_flux2_lokr_to_diffusers",
    "_convert_lycoris_flux2_lokr_to_diffusers",
}  # fmt: skip


def full(converter):
    return f"_convert_{converter}_lora_to_diffusers"


def test_every_converter_is_known():
    found = {name for name in vars(conversions) if name.startswith("_convert_")}
    assert found == {full(r.converter) for r in RECIPES.values() if r.converter} | ELSEWHERE


def parts_of(table):
    """(name, weight of diffusers, whether its halves are swapped), in the order of rows."""
    for name, targets in table.items():
        for target in targets.split():
            yield name, target.lstrip("~"), target.startswith("~")


def wanted_of(model, table, change):
    """Weight of diffusers -> what is added, by the table."""
    wanted, begin = {}, dict.fromkeys(table, 0)
    for name, target, turned in parts_of(table):
        end = begin[name] + layers(model)[target][0]
        rows = change.delta(name)[begin[name] : end]
        begin[name] = end
        wanted[f"{target}.weight"] = swapped(rows) if turned else rows
    return wanted


def changes(module, state):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    distorch.distribute(module, "cpu,*", min_bytes=0, compute="cpu")
    distorch.set_loras(module, [(state, 1.0)])
    after = {name: value - before[name] for name, value in module.state_dict().items()}
    return {name: value for name, value in after.items() if value.any()}


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_names_of_authors_on_modules_of_diffusers(name):
    recipe = RECIPES[name]
    table = recipe.table()
    change = Change({stem: shape_of(recipe.model, targets) for stem, targets in table.items()})
    wanted = wanted_of(recipe.model, table, change)
    close(changes(build(recipe.model), change.state(recipe.prefix, recipe.ends)), wanted)


# What the converters get wrong: they forget that halves are swapped, or swap and cut the other
# factor, too.
WRONG = {
    "flux2": r"adaLN",
    "hunyuan_video": r"adaLN_modulation\.1$|self_attn_qkv",
    "flux, kohya": r"adaLN",
}


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.converter])
def test_tables_say_what_the_converters_do(name):
    recipe = RECIPES[name]
    source = inspect.getsource(getattr(conversions, full(recipe.converter)))
    for old, new in recipe.sizes.items():
        assert old in source
        source = source.replace(old, new)
    scope = dict(vars(conversions))
    exec(source, scope)
    left_out = WRONG.get(name, "$^")
    table = {k: v for k, v in recipe.table().items() if not re.search(left_out, k)}
    change = Change({stem: shape_of(recipe.model, targets) for stem, targets in table.items()})
    converted = scope[full(recipe.converter)](change.state(recipe.prefix, recipe.ends))
    plain = {re.sub(r"^(transformer|text_conditioner)\.", "", k): v for k, v in converted.items()}
    found = {}
    for key, down in plain.items():
        if key.endswith(PEFT[0]):
            up = plain[key.removesuffix(PEFT[0]) + PEFT[1]]
            product = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
            found[f"{key.removesuffix(PEFT[0])}.weight"] = product
    close(found, wanted_of(recipe.model, table, change))


class Tree(nn.Module):
    """Layers under given names."""

    def __init__(self, shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for name, shape in shapes.items():
            at = self
            for step in name.split("."):
                if step not in at._modules:
                    at.add_module(step, nn.Module())
                at = at._modules[step]
            at.weight = nn.Parameter(torch.randn(shape, generator=generator))


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.own])
@pytest.mark.parametrize("prefix", ["transformer.", "lora_transformer_"])
def test_names_of_diffusers_on_modules_of_authors(name, prefix):
    model, table = RECIPES[name].model, RECIPES[name].table()
    shapes = {stem: shape_of(model, targets) for stem, targets in table.items()}
    change = Change({target: layers(model)[target] for _, target, _ in parts_of(table)})
    rows = {stem: [] for stem in table}
    for stem, target, turned in parts_of(table):
        rows[stem].append(swapped(change.delta(target)) if turned else change.delta(target))
    wanted = {f"{stem}.weight": torch.cat(parts) for stem, parts in rows.items()}
    close(changes(Tree(shapes), change.state(prefix, KOHYA)), wanted)


def test_names_that_are_not_read_are_refused():
    change = Change({"blocks.0.attn.qkv_proj": (6, 4)})
    with pytest.raises(distorch.FormatError, match="fit no weight"):
        changes(Tree({"transformer_blocks.0.attn.to_q": (2, 4)}), change.state("", PEFT))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_minimax_h3_of_diffsynth(prefix):
    """Its fused projection has rows head by head, which the adapter's name in the keys tells."""
    generator = torch.Generator().manual_seed(3)
    qkv = "token_refiner.blocks.1.attn.qkv_proj"
    factors = {
        qkv: (3 * 256, 16),
        "blocks.0.attn.out_proj": (16, 256),
        "blocks.0.mlp.fc1": (48, 16),
    }
    state = {}
    for stem, (rows, columns) in factors.items():
        a, b = (prefix + stem + end for end in DEFAULT)
        state[a] = torch.randn(2, columns, generator=generator)
        state[b] = torch.randn(rows, 2, generator=generator)
    convert = conversions._convert_non_diffusers_minimax_h3_lora_to_diffusers
    converted = convert({key: value.clone() for key, value in state.items()})
    wanted = {}
    for key, down in converted.items():
        if key.endswith(PEFT[0]):
            stem = key.removesuffix(PEFT[0])
            wanted[f"{stem.removeprefix('transformer.')}.weight"] = converted[stem + PEFT[1]] @ down
    close(changes(build("minimax_h3"), state), wanted)
    plain = {key.replace(".default", ""): value for key, value in state.items()}
    other = changes(build("minimax_h3"), plain)
    query = "token_refiner.refiner_blocks.1.attn.to_q.weight"
    assert not torch.allclose(other[query], wanted[query], atol=0.1)

    name = prefix + qkv + DEFAULT[1]
    cut = {key: value[:300] if key == name else value for key, value in state.items()}
    with pytest.raises(distorch.FormatError, match="300 rows are not those of whole heads"):
        changes(build("minimax_h3"), cut)
