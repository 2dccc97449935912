# SPDX-License-Identifier: Apache-2.0
"""What an adapter says of itself: PEFT's configuration, in a file beside it or in its metadata.

A key of a configuration is read, or it is known to be harmless, or it is refused. PEFT adds keys
with every version. One of them, passed over, can make every weight wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from distorch._small_files import parse_json
from distorch.errors import FormatError
from distorch.lora.assemble import Scaling
from distorch.lora.targets import component_of, without_component

PEFT_PREFIX = "base_model.model."

# The types whose keys are read; all others are refused by their name.
KNOWN_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT")

# Keys that are read: they set the scale, or have to agree with the tensors.
_USED = frozenset({
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_cayley_neumann", "num_cayley_neumann_terms", "init_lora_weights",
    "trainable_token_indices", "use_dora", "target_modules", "target_parameters",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "peft_version",
})  # fmt: skip
# Keys that say how training went, or what the tensors show themselves.
_HARMLESS = frozenset({
    "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "bias", "lora_bias", "fan_in_fan_out",
    "lora_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout", "boft_dropout",
    "init_weights", "megatron_config", "megatron_core", "eva_config", "corda_config",
    "loftq_config", "lora_ga_config", "velora_config", "runtime_config", "ensure_weight_tying",
    "qalora_group_size", "use_effective_conv2d", "decompose_both", "decompose_factor",
    "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "oft_block_size", "eps",
    "block_share", "merge_weights",
    # Trainers write these beside PEFT's.
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "loraplus_lr_ratio", "loraplus_lr_embedding",
    "dtype", "torch_dtype", "model_type", "quantization_config",
})  # fmt: skip
# Keys that change the result when they are set, and why; so may any key that is not known.
_REASONS = {
    "layer_replication": "it repeats layers of the base, so that the module is another",
    "alora_invocation_tokens": "it acts only behind these tokens, which no merged weight can do",
    "arrow_config": "it mixes several adapters token by token, which no merged weight can do",
    "use_bdlora": "its factors are cut into blocks",
    "use_qalora": "its factors act on pooled inputs",
    "kasa_config": "it takes singular values out of the base",
    "monteclora_config": "its factors are drawn from a distribution",
    "coft": "it bounds its rotations while they are used",
}
# Initialisations that leave the base as it was. Others take their first factors out of it.
_KEEPING = ("gaussian", "eva", "orthogonal", "mica", "default")

_TYPES = {
    "target_modules": (str, list), "exclude_modules": (str, list), "target_parameters": (str, list),
    "layers_pattern": (str, list), "layers_to_transform": (int, list), "modules_to_save": (list,),
    "peft_type": (str,),
}  # fmt: skip
_IN_WORDS = {str: "text", list: "list", int: "number"}
_MOST_TERMS = 64  # of a series that PEFT cuts off after 5
_PEFT_ALPHA = 8  # where a configuration does not say it

# Keys that stand alone in a file's metadata: "lora_alpha", "transformer.r".
_FLAT = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
                   "init_lora_weights", *_REASONS})  # fmt: skip
_WORDS: dict[str, bool | None] = {"True": True, "False": False, "None": None}


def names_parameter(wanted: Collection[str], name: str) -> bool:
    """PEFT's rule for `target_parameters`: the whole name, or the end of it."""
    return any(name == end or name.endswith(f".{end}") for end in wanted)


@dataclass(eq=False)
class Configuration:
    """The configurations of one file, by the part of a pipeline that each is for ("" for all)."""

    label: str
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: bool = False  # from adapter_config.json, by which PEFT chooses modules
    header_alpha: float | None = None  # of all layers: MiniMax H3's
    _compiled: dict[tuple[int, str], list[tuple[re.Pattern[str], Any]]] = field(
        default_factory=dict, repr=False
    )

    def of(self, stem: str) -> tuple[Mapping[str, Any], str]:
        """The configuration that a stem belongs to, and the stem's name inside that part.

        FormatError if several differ and the stem does not say which.
        """
        for part, config in self.parts.items():
            if part and stem.startswith(f"{part}."):
                return config, stem.removeprefix(f"{part}.")
        if "" in self.parts:
            return self.parts[""], stem.removeprefix(PEFT_PREFIX)
        component = component_of(stem)
        fitting = [
            config
            for part, config in self.parts.items()
            if not component or component_of(f"{part}.") == component
        ]
        if len(fitting) > 1 and any(config != fitting[0] for config in fitting):
            raise FormatError(
                f"{self.label}: its metadata has a configuration each for "
                f"{', '.join(self.parts)}, and {stem!r} does not say to which it belongs"
            )
        return (fitting[0] if fitting else {}), without_component(stem)

    def scaling(self, stem: str, own_alpha: float | None) -> Scaling:
        """How strong the patch of one target is at strength 1. `own_alpha`, if its tensors have
        one, wins over the configuration. FormatError if a value is no number.
        """
        config, name = self.of(stem)
        alpha, rank = own_alpha, None
        if alpha is None:
            whole = config.get("lora_alpha", config.get("alpha"))
            alpha = self._by_pattern(config, "alpha_pattern", name, whole)
            rank = self._by_pattern(config, "rank_pattern", name, config.get("r"))
        by_series = config.get("use_cayley_neumann", False)
        terms = config.get("num_cayley_neumann_terms", 5) if by_series else 0
        try:
            found = Scaling(
                None if alpha is None else float(alpha),
                None if rank is None else int(rank),
                bool(config.get("use_rslora", False)),
                int(terms),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{self.label}: alpha or rank of {stem!r} is no number") from error
        if not 0 <= found.terms <= _MOST_TERMS or not math.isfinite(found.alpha or 0):
            raise FormatError(
                f"{self.label}: alpha or the terms of the series of {stem!r} are no sensible number"
            )
        return found

    def check_agrees(self, stem: str, parts: Collection[str]) -> None:
        """FormatError where the configuration says something else of a target than its tensors."""
        config, name = self.of(stem)
        decomposed = "magnitude" in parts
        if "up" in parts and bool(config.get("use_dora", decomposed)) != decomposed:
            raise FormatError(
                f"its configuration says use_dora={config['use_dora']}, and it has "
                f"{'magnitudes' if decomposed else 'no magnitudes'}"
            )
        if (
            self.beside
            and stem.startswith(PEFT_PREFIX)
            and (key := self._left_out_by(config, name))
        ):
            raise FormatError(
                f"its configuration says {key}={config[key]!r:.80}, which leaves {name!r} out, so "
                "that PEFT passes over its keys; expected both to agree"
            )

    def _left_out_by(self, config: Mapping[str, Any], name: str) -> str | None:
        """The key by which PEFT leaves a module out, if it does."""
        if (left := config.get("exclude_modules")) and self._names_it(
            left, name, "exclude_modules"
        ):
            return "exclude_modules"
        wanted = config.get("target_modules")
        if not wanted or wanted == "all-linear":
            return None
        if not self._names_it(wanted, name, "target_modules"):
            return None if config.get("target_parameters") else "target_modules"
        layers = config.get("layers_to_transform")
        if layers in (None, []) or isinstance(wanted, str) or name in wanted:
            return None
        given = config.get("layers_pattern") or r"[^.]*"
        for pattern in [given] if isinstance(given, str) else given:
            whole = _compile(pattern, "layers_pattern", self.label, r"(?:.*?\.)?{}\.(\d+)\.")
            if found := whole.match(name):
                chosen = layers if isinstance(layers, list) else [layers]
                return None if int(found.group(1)) in chosen else "layers_to_transform"
        return "layers_to_transform"

    def _names_it(self, modules: Any, name: str, key: str) -> bool:
        """PEFT's rule: a regular expression for the whole name, or ends of names."""
        if isinstance(modules, str):
            return _compile(modules, key, self.label).fullmatch(name) is not None
        return any(name == end or name.endswith(f".{end}") for end in modules)

    def parameters(self, stem: str) -> tuple[Collection[str], str]:
        """The names of parameters that PEFT put LoRAs on, and the stem's own name beside them."""
        if not any(config.get("target_parameters") for config in self.parts.values()):
            return (), stem  # most files have none
        config, name = self.of(stem)
        wanted = config.get("target_parameters") or ()
        if isinstance(wanted, str) or not all(isinstance(key, str) for key in wanted):
            raise FormatError(
                f"{self.label}: its configuration says target_parameters={wanted!r:.80}; expected "
                "a list of names"
            )
        return wanted, name

    def saves_module(self, name: str) -> bool:
        """Whether a weight is of a module that was trained whole, apart from what it is tied to."""
        config, inner = self.of(name)
        saved = config.get("modules_to_save") or ()
        return any(f".{module}." in f".{inner}." for module in saved)

    def token_rows(self, stem: str) -> list[int]:
        """The numbers of the embedding rows that PEFT trained one by one. FormatError if there are
        none.
        """
        config, name = self.of(stem)
        told = config.get("trainable_token_indices")
        if isinstance(told, dict):
            found = next((v for k, v in told.items() if name == k or name.endswith(f".{k}")), None)
        else:
            found = told
        if not isinstance(found, list) or not all(isinstance(index, int) for index in found):
            raise FormatError(
                f"{self.label}: {stem!r} has rows of single tokens; expected their numbers as "
                f"trainable_token_indices in its adapter_config.json, found {told!r:.80}"
            )
        return found

    def _by_pattern(self, config: Mapping[str, Any], table: str, name: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that is the end of a module's name, or all of it."""
        for pattern, value in self._patterns(config, table):
            if pattern.match(name):
                return value
        return default

    def _patterns(self, config: Mapping[str, Any], table: str) -> list[tuple[re.Pattern[str], Any]]:
        """A table's patterns, compiled once: there may be one for every layer."""
        key = id(config), table
        if key not in self._compiled:
            patterns = config.get(table) or {}
            if not isinstance(patterns, dict):
                raise FormatError(f"{self.label}: its {table} is no table: {patterns!r:.80}")
            self._compiled[key] = [
                (_compile(pattern, table, self.label, r"(.*\.)?({})$"), value)
                for pattern, value in patterns.items()
            ]
        return self._compiled[key]


def read_configuration(
    label: str, metadata: Mapping[str, str], beside: Mapping[str, Any]
) -> Configuration:
    """From a safetensors file's metadata, else from `beside` (adapter_config.json); checked.

    FormatError on a configuration under which the tensors are not what they seem.
    """
    within = _within(metadata, label)
    parts = within or ({"": dict(beside)} if beside else {})
    for config in parts.values():
        _check(config, label)
        _fill_defaults(config, label)
    for part, config in _flat(metadata).items():
        _check(config, label)
        parts[part] = {**config, **parts.get(part, {})}
    return Configuration(
        label, parts, beside=bool(beside) and not within, header_alpha=_alpha_of(metadata)
    )


def _alpha_of(metadata: Mapping[str, str]) -> float | None:
    """The number under "alpha"; diffusers passes over what is none."""
    try:
        return float(metadata["alpha"])
    except (KeyError, ValueError):
        return None


def is_configured(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file's metadata says how strong the LoRA is."""
    return "lora_adapter_metadata" in metadata or bool(_flat(metadata))


def _within(metadata: Mapping[str, str], label: str) -> dict[str, dict[str, Any]]:
    """What diffusers writes: one table, its keys under the name of a part ("unet.lora_alpha")."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        read = parse_json(text)
    except ValueError as error:
        raise FormatError(f"{label}: its lora_adapter_metadata is no JSON ({error})") from error
    if not isinstance(read, dict):
        raise FormatError(f"{label}: its lora_adapter_metadata is no table: {text:.80}")
    return _by_part(read)


def _flat(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Single keys of a configuration that stand in the metadata as they are."""
    known = {key: _value(text) for key, text in metadata.items() if key.split(".")[-1] in _FLAT}
    return _by_part(known)


def _by_part(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        part, _, name = key.rpartition(".")
        parts.setdefault(part, {})[name] = value
    return parts


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return _WORDS.get(text, text)


def _fill_defaults(config: dict[str, Any], label: str) -> None:
    """What PEFT takes for keys that a table of its own leaves out."""
    key = "lora_alpha" if (config.get("peft_type") or "LORA") == "LORA" else "alpha"
    config.setdefault(key, _PEFT_ALPHA)
    if not isinstance(config[key], int | float):
        raise FormatError(
            f"{label}: its configuration says {key}={config[key]!r}; expected a number"
        )


def _compile(pattern: str, key: str, label: str, within: str = "{}") -> re.Pattern[str]:
    """A regular expression of a configuration, put into `within` where that has {}. FormatError if
    it is none.
    """
    try:
        return re.compile(within.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{label}: {pattern!r:.80} in its {key} is no pattern ({error})"
        ) from error


def _check(config: Mapping[str, Any], label: str) -> None:
    kind = config.get("peft_type") or "LORA"
    if kind not in KNOWN_TYPES:
        raise FormatError(
            f"{label}: it is an adapter of peft_type {kind!r}, which is not read; expected "
            f"{', '.join(KNOWN_TYPES)}. Merge it with PEFT (merge_and_unload), and load the result"
        )
    for key, types in _TYPES.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            names = " or a ".join(_IN_WORDS[t] for t in types)
            raise FormatError(
                f"{label}: its configuration says {key}={value!r:.80}; expected a {names}"
            )
    _check_start(config.get("init_lora_weights"), label)
    for key, value in config.items():
        if key in _USED or key in _HARMLESS or not value:
            continue
        why = _REASONS.get(key, "this key is not known, and may change every weight")
        raise FormatError(
            f"{label}: its configuration says {key}={value!r:.80}: {why}. Put it on with PEFT"
        )


def _check_start(start: Any, label: str) -> None:
    """PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and others train against a base that they changed."""
    if start is None or isinstance(start, bool) or str(start).lower() in _KEEPING:
        return
    raise FormatError(
        f"{label}: its configuration says init_lora_weights={start!r}: its first factors were "
        "taken out of the base, so that they do not fit the base as it is. Save it again with "
        "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a "
        "plain LoRA of it"
    )
