# SPDX-License-Identifier: Apache-2.0
"""Other names that a module's weights have elsewhere: fused projections, renamed families.

The same network is written down in several ways (the paper's own code, diffusers, ComfyUI), and a
LoRA that was trained on one of them fits the others by name and by rows. From the names that a
module has, `other_names` makes those that it would have there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distorch.lora.family_tables import ROWS

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Where a patch goes: rows of `weight` from `step` times the patch's rows on.

    A negative `step` counts from the weight's end. `cut` [begin, end): only these rows of the
    patch go there. `part`: it may cover only some of the weight's rows. `matrix`: the weight is a
    stack of matrices, and the patch goes on rows [begin, end) of this one (`rows`).
    """

    weight: str
    step: int = 0
    cut: tuple[int, int] | None = None
    part: bool = False
    matrix: int | None = None
    rows: tuple[int, int] = (0, 0)


# Separate parts of a fused weight, and where each of them begins (see Place.step): parts that are
# alike, or where the last ones are (grouped queries: keys and values have fewer rows).
_QKV_STEPS = (0, -2, -1)
_PAIR_STEPS = (0, -1)
_QKV_MLP_STEPS = (0, 1, 2, -1)
_STEPS = {1: (0,), 2: _PAIR_STEPS, 3: _QKV_STEPS, 4: _QKV_MLP_STEPS}

_GENERIC = (
    (("to_q", "to_k", "to_v"), ("to_qkv", "qkv", "attn.qkv"), _QKV_STEPS),
    (("q_proj", "k_proj", "v_proj"), ("qkv_proj", "in_proj", "qkv"), _QKV_STEPS),
    (("q", "k", "v"), ("qkv",), _QKV_STEPS),
    (("wq", "wk", "wv"), ("wqkv", "qkv"), _QKV_STEPS),
    (("query", "key", "value"), ("qkv",), _QKV_STEPS),
    (("add_q_proj", "add_k_proj", "add_v_proj"), ("to_added_qkv",), _QKV_STEPS),
    (("to_k", "to_v"), ("to_kv",), _PAIR_STEPS),
    (("gate_proj", "up_proj"), ("gate_up_proj",), _PAIR_STEPS),
    (("to_out.0",), ("out", "to_out", "o"), (0,)),
)

# XLabs' names for parts of the original blocks.
_XLABS = (
    ("processor.qkv_lora1", "img_attn.qkv"), ("processor.qkv_lora2", "txt_attn.qkv"),
    ("processor.proj_lora1", "img_attn.proj"), ("processor.proj_lora2", "txt_attn.proj"),
)  # fmt: skip

# What only some models of a family have: Wan's image branch. Its LoRAs are used on the others, too.
OPTIONAL_BRANCH = re.compile(r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb)(?:[._]|$)")

_RESNET = (
    ("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"),
)  # fmt: skip
_UNET_TOP = (
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"),
)  # fmt: skip
_UNET_LAYERS = 2  # resnets in a block of Stable Diffusion's down path
_UNET_BLOCKS = 4


@dataclass(frozen=True)
class _Same:
    """`fused` holds the rows of `parts`, one after the other; `swapped`: their halves."""

    fused: str
    parts: tuple[str, ...]
    steps: tuple[int, ...] = (0,)
    swapped: bool = False


def other_names(shapes: Shapes) -> dict[str, list[Place]]:
    """Module names (without ".weight") that a LoRA may use, with where its patch then goes."""
    weights = weights_by_module(shapes)
    modules = set(weights)
    found: dict[str, list[Place]] = {}
    for same in _all(modules):
        for name, places in _places(same, weights, shapes):
            if name not in modules:
                found.setdefault(name, places)
    found.update(_attention_matrices(shapes))
    for alias, name in _xlabs_names(modules | set(found)):
        places = found.get(name) or [Place(f"{name}.weight", part=True)]
        if all(place.weight in shapes for place in places):
            found.setdefault(alias, places)
    return found


def weights_by_module(shapes: Shapes) -> dict[str, str]:
    """Names of modules, and of parameters that are no weight or bias of one -> the parameter's."""
    # FLUX's own code calls the weight of a norm its scale.
    plain = {
        name.removesuffix(".scale") if name.endswith("_norm.scale") else name: name
        for name in shapes
        if not name.endswith((".weight", ".bias"))
    }
    modules = {name.removesuffix(".weight"): name for name in shapes if name.endswith(".weight")}
    return {**plain, **modules}


def _places(
    same: _Same, weights: Mapping[str, str], shapes: Shapes
) -> Iterator[tuple[str, list[Place]]]:
    if same.swapped:
        for mine, other in ((same.fused, same.parts[0]), (same.parts[0], same.fused)):
            if mine in weights:
                half = shapes[weights[mine]][0] // 2
                halves = ((1, (0, half)), (0, (half, 2 * half)))
                yield other, [Place(weights[mine], step, cut, part=True) for step, cut in halves]
        return
    if same.fused in weights:
        weight = weights[same.fused]
        for part, step in zip(same.parts, same.steps, strict=True):
            yield part, [Place(weight, step, part=len(same.parts) > 1)]
    if all(part in weights for part in same.parts):
        places, begin = [], 0
        for part in same.parts if len(same.parts) > 1 else ():
            end = begin + shapes[weights[part]][0]
            places.append(Place(weights[part], 0, (begin, end)))
            begin = end
        places = places or [Place(weights[same.parts[0]])]
        yield same.fused, places


def _all(modules: set[str]) -> Iterator[_Same]:
    yield from _generic(modules)
    numbers = _numbers_of_blocks(modules)
    for author, names in ROWS:
        parts = tuple(name.replace("~", "") for name in names)
        steps, swapped = _STEPS[len(parts)], names != parts
        if "{}" not in author:
            yield _Same(author, parts, steps, swapped)
            continue
        for i in sorted({*numbers[_before(author)], *numbers[_before(parts[0])]}):
            numbered = tuple(part.format(i) for part in parts)
            yield _Same(author.format(i), numbered, steps, swapped)
    if any(name.startswith(("down_blocks.", "input_blocks.")) for name in modules):
        yield from (_Same(a, (b,)) for a, b in _unet_names(modules))


def _before(name: str) -> str:
    return name.partition("{}")[0]


def _numbers_of_blocks(modules: set[str]) -> dict[str, set[int]]:
    """What stands before the number of a block -> the numbers that the module has there."""
    found: dict[str, set[int]] = {
        _before(name): set() for author, parts in ROWS for name in (author, parts[0])
    }
    for name in modules:
        steps = name.split(".")
        for place, step in enumerate(steps):
            before = "".join(f"{s}." for s in steps[:place])
            if step.isdecimal() and before in found:
                found[before].add(int(step))
    return found


def _generic(modules: set[str]) -> Iterator[_Same]:
    for parts, fused, steps in _GENERIC:
        for name in modules:
            for last in (parts[0], *fused):
                if name != last and not name.endswith(f".{last}"):
                    continue
                stem = name.removesuffix(last)
                for whole in fused:
                    yield _Same(stem + whole, tuple(stem + part for part in parts), steps)


def _attention_matrices(shapes: Shapes) -> dict[str, list[Place]]:
    """nn.MultiheadAttention keeps its three projections in one `in_proj_weight`."""
    found = {}
    for name in shapes:
        if name.endswith("in_proj_weight"):
            stem = name.removesuffix("in_proj_weight")
            for part, step in zip(("q_proj", "k_proj", "v_proj"), _QKV_STEPS, strict=True):
                found[stem + part] = [Place(name, step, part=True)]
            found[f"{stem}in_proj"] = [Place(name)]
    return found


def _xlabs_names(names: set[str]) -> Iterator[tuple[str, str]]:
    for i in _indices(names, r"double_blocks\.(\d+)\."):
        for alias, name in _XLABS:
            yield f"double_blocks.{i}.{alias}", f"double_blocks.{i}.{name}"
    for i in _indices(names, r"single_blocks\.(\d+)\."):
        if f"single_blocks.{i}.processor.qkv" not in names:
            yield f"single_blocks.{i}.processor.qkv", f"single_blocks.{i}.linear1"
        yield f"single_blocks.{i}.processor.proj", f"single_blocks.{i}.linear2"


def _indices(names: set[str], pattern: str) -> list[str]:
    found = {match.group(1) for name in names if (match := re.match(pattern, name))}
    return sorted(found, key=int)


def _unet_names(modules: set[str]) -> Iterator[tuple[str, str]]:
    """(original, diffusers) names of the parts of Stable Diffusion's U-Net."""
    yield from _UNET_TOP
    layers, step = _UNET_LAYERS, _UNET_LAYERS + 1
    inner = _inner_names(modules)
    for block in range(_UNET_BLOCKS):
        for layer in range(layers):
            original = f"input_blocks.{1 + block * step + layer}"
            yield from _resnet(f"{original}.0", f"down_blocks.{block}.resnets.{layer}")
            yield from _inside(f"{original}.1", f"down_blocks.{block}.attentions.{layer}", inner)
        original = f"input_blocks.{1 + block * step + layers}"
        yield f"{original}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
        for layer in range(step):
            original = f"output_blocks.{block * step + layer}"
            yield from _resnet(f"{original}.0", f"up_blocks.{block}.resnets.{layer}")
            yield from _inside(f"{original}.1", f"up_blocks.{block}.attentions.{layer}", inner)
        for place in (1, 2):
            original = f"output_blocks.{block * step + layers}.{place}.conv"
            yield original, f"up_blocks.{block}.upsamplers.0.conv"
    for place, index in ((0, 0), (2, 1)):
        yield from _resnet(f"middle_block.{place}", f"mid_block.resnets.{index}")
    yield from _inside("middle_block.1", "mid_block.attentions.0", inner)


def _resnet(original: str, ours: str) -> Iterator[tuple[str, str]]:
    return ((f"{original}.{a}", f"{ours}.{b}") for a, b in _RESNET)


def _inner_names(modules: set[str]) -> Sequence[str]:
    """What lies inside attention blocks, the same in both: proj_in, transformer_blocks.0...."""
    pattern = re.compile(
        r"(?:(?:down_blocks|up_blocks|mid_block)[.\d]*attentions\.\d+"
        r"|(?:input_blocks|output_blocks)\.\d+\.1|middle_block\.1)\."
        r"(norm|proj_in|proj_out|transformer_blocks\..+)$"
    )
    return sorted({match.group(1) for name in modules if (match := pattern.match(name))})


def _inside(original: str, ours: str, inner: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((f"{original}.{name}", f"{ours}.{name}") for name in inner)
