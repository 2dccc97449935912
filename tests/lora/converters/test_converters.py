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
from safetensors.torch import save_file
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


def one_layer(stem, rows, columns=16, alpha=None):
    generator = torch.Generator().manual_seed(4)
    factors = (2, columns), (rows, 2)
    found = {
        stem + end: torch.randn(shape, generator=generator)
        for end, shape in zip(PEFT, factors, strict=True)
    }
    return found | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)})


H3_LAYER = "blocks.0.attn.out_proj"
# metadata of the file, alpha among its tensors -> how much stronger than without both
ALPHAS = {
    "header": ({"alpha": "8"}, None, 4.0),
    "no number": ({"alpha": "8/1"}, None, 1.0),
    "tensors win": ({"alpha": "8"}, 1.0, 0.5),
    "diffusers' own metadata win": (
        {"alpha": "8", "lora_adapter_metadata": '{"transformer.lora_alpha": 6, "transformer.r": 2}'},
        None, 3.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ALPHAS)
def test_alpha_in_the_header_of_minimax_h3(tmp_path, case):
    """Only this family's LoRAs have it there: for others diffusers passes it over, and so do we."""
    metadata, alpha, stronger = ALPHAS[case]
    state = one_layer(f"diffusion_model.{H3_LAYER}", 16, 256)
    plain = changes(build("minimax_h3"), state)
    file = tmp_path / "lora.safetensors"
    tensors = one_layer(f"diffusion_model.{H3_LAYER}", 16, 256, alpha)
    save_file(tensors, file, metadata)
    close(changes(build("minimax_h3"), file), {k: v * stronger for k, v in plain.items()})

    other = {"diffusion_model.img_in.lora_A.weight": torch.ones(2, 4),
             "diffusion_model.img_in.lora_B.weight": torch.ones(16, 2)}  # fmt: skip
    save_file(other, file, {"alpha": "8"})
    close(changes(build("flux"), file), changes(build("flux"), other))
    # LTX-2 has audio layers of the same names.
    other = one_layer("transformer.audio_proj_in", *layers("ltx2")["audio_proj_in"])
    save_file(other, file, {"alpha": "8"})
    close(changes(build("ltx2"), file), changes(build("ltx2"), other))


@pytest.mark.parametrize("rows", [1, 24, 46, 47, 49, 72])
def test_rows_that_are_not_all_of_a_layer_whose_halves_are_swapped(rows):
    for stem, name in (
        ("blocks.0.mlp.fc1", "ff.net.0.proj"),
        ("token_refiner.blocks.1.mlp.fc1", "ff"),
    ):
        with pytest.raises(
            distorch.FormatError, match=rf"{name}.*the rows that it is for are more"
        ):
            changes(build("minimax_h3"), one_layer(stem, rows))


@pytest.mark.parametrize("rows", [256, 767, 769, 1024])
def test_rows_that_are_not_all_of_a_fused_projection(rows):
    """With strict_loras=False all of the target is left out: queries are not patched alone."""
    state = one_layer("blocks.0.attn.qkv_proj", rows)
    with pytest.raises(distorch.FormatError, match="the rows that it is for are more or fewer"):
        changes(build("minimax_h3"), state)
    module = distorch.distribute(build("minimax_h3"), "cpu,*", min_bytes=0, compute="cpu")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    good = one_layer("blocks.0.attn.out_proj", 16, 256)
    with pytest.warns(UserWarning, match="the rows that it is for are more or fewer"):
        distorch.set_loras(module, [(state | good, 1.0)], strict_loras=False)
    changed = [name for name, value in module.state_dict().items() if (value != before[name]).any()]
    assert changed == ["transformer_blocks.0.attn.to_out.0.weight"]
