# SPDX-License-Identifier: Apache-2.0
"""From a LoRA's stems to a module's weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from distorch.formats.plain_names import base_name, unwrapped
from distorch.lora.other_names import Place, Shapes, other_names, weights_by_module

# What files put before the names of a module, and which part of a pipeline that says.
_PREFIXES: tuple[tuple[str, str], ...] = (
    ("base_model.model.", ""), ("model.diffusion_model.", "model"), ("diffusion_model.", "model"),
    ("transformer.", "model"), ("unet.", "model"), ("lora_unet_", "model"),
    ("lora_transformer_", "model"), ("lora_prior_unet_", "model"), ("lycoris_", ""),
    ("text_encoder_2.", "text 2"), ("text_encoder_3.", "text 3"), ("text_encoder.", "text 1"),
    ("lora_te1_", "text 1"), ("lora_te2_", "text 2"), ("lora_te3_", "text 3"),
    ("lora_te_", "text 1"), ("text_encoders.clip_l.", "text 1"),
    ("text_encoders.clip_g.", "text 2"), ("text_encoders.t5xxl.", "text 3"),
    ("text_model.", ""), ("text_model_", ""), ("model.", ""), ("module.", ""),
    ("transformer_", ""), ("diffusion_model_", "model"), ("conditional_transformer.", "model"),
    ("llm_adapter.", ""), ("llm_adapter_", ""), ("transformer_ref.", "reference"),
)  # fmt: skip


def component_of(stem: str) -> str:
    """The part of a pipeline that a stem names: "model", "text 1", "reference" (MiniMax H3's second
    transformer), ..., or "" for no word of it.
    """
    if stem.startswith("base_model.model."):
        stem = stem.removeprefix("base_model.model.")
    return next((part for prefix, part in _PREFIXES if part and stem.startswith(prefix)), "")


def without_component(stem: str) -> str:
    """The stem without what names a part of a pipeline: "unet.a.b" is "a.b" of the U-Net."""
    found = next((p for p, part in _PREFIXES if part and stem.startswith(p)), "")
    return stem.removeprefix(found)


def _without_prefixes(stem: str) -> Iterator[str]:
    """The stem, and what is left when prefixes are taken off, in any order. Underscores that
    trainers leave at the ends go, too.
    """
    seen, queue = set(), [unwrapped(stem), unwrapped(stem).strip("_")]
    while queue:
        name = queue.pop(0)
        if name in seen:
            continue
        seen.add(name)
        yield name
        rests = [name.removeprefix(p) for p, _ in _PREFIXES if name.startswith(p) and name != p]
        queue += [*rests, *(rest.lstrip("_") for rest in rests)]


def _respelled(name: str) -> Iterator[str]:
    yield name
    if "block_sparse_moe." in name:  # Mixtral's, before transformers 5
        yield name.replace("block_sparse_moe.", "mlp.")
    plain = re.sub(r"\.processor\.(?=(to_|add_))", ".", name)
    plain = re.sub(r"(?<=\.)to_out$", "to_out.0", plain)
    plain = re.sub(r"^sformer_blocks\.", "transformer_blocks.", plain)
    plain = re.sub(r"(?<=\.self_attn\.)to_(q|k|v|out)(\.0)?$", r"\1_proj", plain)
    if plain != name:
        yield plain


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _common_paths(names: Shapes) -> list[str]:
    """The steps that all names begin with: "transformer." in a wrapper of one; shortest first."""
    paths = [name.split(".")[:-1] for name in names]
    found: list[str] = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1 or steps[0].isdigit():
            break
        found.append(f"{found[-1] if found else ''}{steps[0]}.")
    return found


def _parameters_by_module(shapes: Shapes) -> dict[str, list[str]]:
    """Every module's own parameters; its name also without the steps that all names begin with."""
    found: dict[str, list[str]] = {}
    for path in ("", *_common_paths(shapes)):
        known = set(found)
        for name in shapes:
            module = unwrapped(name.rpartition(".")[0].removeprefix(path))
            if module not in known:
                found.setdefault(module, []).append(name)
    return found


def _places_by_name(shapes: Shapes) -> dict[str, list[Place]]:
    """Every name of a weight, its own first: with and without ".weight", and other families'."""
    found: dict[str, list[Place]] = {}
    for name in shapes:
        found[unwrapped(name)] = [Place(name)]
    for module, name in weights_by_module(shapes).items():
        found[unwrapped(module)] = [Place(name)]
    for name, places in other_names(shapes).items():
        found.setdefault(name, places)
    return found


# One expert's layers, as files name them, in the stack that a layer keeps all experts in: the
# parameter, and from where to where their rows are in its matrices.
_OF_EXPERTS = {
    "gate_proj": ("gate_up_proj", 0, 0.5), "up_proj": ("gate_up_proj", 0.5, 1),
    "down_proj": ("down_proj", 0, 1), "w1": ("gate_up_proj", 0, 0.5),
    "w3": ("gate_up_proj", 0.5, 1), "w2": ("down_proj", 0, 1),
}  # fmt: skip
_LAYERS = "|".join(_OF_EXPERTS)
_EXPERT = re.compile(rf"(?P<module>(?:.+\.)?experts)\.(?P<number>\d+)\.(?P<layer>{_LAYERS})$")
_FLAT_EXPERT = re.compile(rf"(?P<module>(?:.+_)?experts)_(?P<number>\d+)_(?P<layer>{_LAYERS})$")


@dataclass(frozen=True)
class WeightKinds:
    """Parameters that are not like the weight of any linear layer, by name."""

    transposed: frozenset[str] = frozenset()  # [.., inputs, outputs]
    experts: frozenset[str] = frozenset()  # [experts, outputs, inputs], gates before ups
    inputs: frozenset[str] = frozenset()  # of linear layers that take the model's own input


class Targets:
    """The weights of a module by every name that a LoRA may use for them.

    `shapes` name of a parameter -> shape; `kinds`: what else is known of some of them.
    """

    def __init__(self, shapes: Shapes, kinds: WeightKinds | None = None) -> None:
        self.shapes = dict(shapes)
        self.kinds = kinds or WeightKinds()
        self._parameters = _parameters_by_module(shapes)
        self._found: dict[str, list[Place]] = {}  # what was asked for
        self._places = _places_by_name(shapes)
        for path in _common_paths(shapes):
            inner = {name.removeprefix(path): shape for name, shape in shapes.items()}
            for name, places in _places_by_name(inner).items():
                moved = [replace(place, weight=path + place.weight) for place in places]
                self._places.setdefault(name, moved)
        self._flat: dict[str, list[Place] | None] = {}
        for name, places in self._places.items():
            flat = _flat(name)
            known = self._flat.get(flat, places)
            self._flat[flat] = places if known == places else None  # two that look alike: neither

    def parameters_of(self, stem: str) -> list[str]:
        """The parameters that a module has itself, in its order; empty if there is no such one."""
        for name in _without_prefixes(stem):
            for spelled in _respelled(name):
                if spelled in self._parameters:
                    return self._parameters[spelled]
        return []

    def _of_expert(self, stem: str) -> list[Place]:
        """Where one expert's layer is, if all experts are kept as stacks."""
        found = self._stack_of(stem)
        if found is None:
            return []
        name, expert, shares = found
        experts, rows, _ = self.shapes[name]
        first, last = (int(share * rows) for share in shares)
        place = Place(name, part=True, matrix=expert, rows=(first, last))
        return [place] if expert < experts else []

    def number_of_experts(self, stem: str) -> int:
        """How many experts the stack has that a stem is one of; 0 where it is none."""
        found = self._stack_of(stem)
        return self.shapes[found[0]][0] if found else 0

    def _stack_of(self, stem: str) -> tuple[str, int, tuple[float, ...]] | None:
        """The stack, the expert, and the share of its rows that a stem names."""
        if expert := _EXPERT.match(stem):
            modules = [expert["module"]]
        elif expert := _FLAT_EXPERT.match(stem):
            flat = set(_without_prefixes(expert["module"]))
            modules = [name for name in self._parameters if _flat(name) in flat]
        else:
            return None
        stack, *shares = _OF_EXPERTS[expert["layer"]]
        for name in (name for module in modules for name in self.parameters_of(module)):
            if name.endswith(f".{stack}") and name in self.kinds.experts:
                return name, int(expert["number"]), tuple(map(float, shares))
        return None

    def find(self, stem: str) -> list[Place]:
        """Where a patch with that stem goes; empty when nowhere."""
        if stem not in self._found:
            self._found[stem] = self._find(stem)
        return self._found[stem]

    def _find(self, stem: str) -> list[Place]:
        # Of a module inside one that PEFT put LoRAs on.
        stem = base_name(stem)
        if of_expert := self._of_expert(stem):
            return of_expert
        for name in _without_prefixes(stem):
            for spelled in _respelled(name):
                if spelled in self._places:
                    return self._places[spelled]
        for name in _without_prefixes(stem):
            for spelled in _respelled(name):
                if places := self._flat.get(_flat(spelled)):
                    return places
        return []

    def bias_of(self, weight: str) -> str | None:
        """The bias beside a weight, if the module has one."""
        if weight.endswith("in_proj_weight"):
            name = f"{weight.removesuffix('weight')}bias"
        else:
            name = f"{weight.removesuffix('.weight')}.bias"
        return name if name in self.shapes else None
