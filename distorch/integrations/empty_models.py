# SPDX-License-Identifier: Apache-2.0
"""Models of transformers and diffusers without weights, as their `from_pretrained` would make them.

The dtype of every parameter is the one that the library would load it in: `distorch.load(...,
dtype="module")` then gives the same bits.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distorch.errors import FormatError, SpecError
from distorch.loading import init_empty_weights

# The default dtype belongs to the process. If two threads changed it at once, the second would
# restore what the first had set, for good. So models are built one after the other.
_BUILDING = threading.Lock()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    with _BUILDING:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def empty_transformers_model(cls: Any, config: Any, dtype: torch.dtype, **remote: Any) -> nn.Module:
    """A model of a class, or of the class that an Auto class chooses, without weights.

    `dtype` is the one to compute in; parameters that the class keeps in float32 have that.
    """
    config = copy.deepcopy(config)
    # As transformers does: parts of a composite model read their own configuration.
    config.dtype = dtype
    for name in getattr(config, "sub_configs", None) or ():
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype
    with _default_dtype(dtype), init_empty_weights():
        if hasattr(cls, "from_config"):  # an Auto class
            model = cls.from_config(config, dtype=dtype, **remote)
        else:
            model = cls._from_config(config, dtype=dtype)
    _keep_wide(model, _wide_patterns(model, dtype))
    return model.eval()  # type: ignore[no-any-return]


def _wide_patterns(model: Any, dtype: torch.dtype) -> list[str]:
    """What stays in float32, as regular expressions on names."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    in_half = getattr(model, "_keep_in_fp32_modules", None) or ()
    found = list(always) if dtype in (torch.float16, torch.bfloat16) else []
    found += list(in_half) if dtype == torch.float16 else []
    return [str(pattern).replace("*", ".*") for pattern in found]


def _keep_wide(model: nn.Module, patterns: Iterable[str]) -> None:
    wide = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.is_floating_point() and wide.search(name):
            parameter.data = parameter.data.float()


def empty_diffusers_model(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model of a class with the configuration in a folder, without weights. FormatError.

    `dtype` is the one to compute in; parameters that the class keeps in float32 have that.
    """
    try:
        config = cls.load_config(folder)
    except OSError as error:
        raise FormatError(f"{str(folder)!r} has no configuration of a model: {error}") from error
    with init_empty_weights(), _default_dtype(dtype):
        model = cls.from_config(config)
    wide = set(_listed(getattr(type(model), "_keep_in_fp32_modules", None)))
    # diffusers converts all floating tensors of a file, whatever dtype the model's code gives them.
    for path, owner in model.named_modules():
        tables = (owner._parameters, owner._buffers)
        for key, tensor in [entry for table in tables for entry in table.items()]:
            if tensor is None or not tensor.is_floating_point():
                continue
            if key in owner._buffers and key in owner._non_persistent_buffers_set:
                continue
            is_wide = not wide.isdisjoint([*path.split("."), key])
            tensor.data = tensor.data.to(torch.float32 if is_wide else dtype)
    return model.eval()  # type: ignore[no-any-return]


def _listed(steps: Any) -> tuple[str, ...]:
    return (steps,) if isinstance(steps, str) else tuple(steps or ())


def give_initial_values(model: Any, names: Iterable[str]) -> list[str]:
    """Values for weights that no file has, as the class's own initialisation gives them: positions
    that are computed, and what stands on the base model (a new head, a pooler). Returns the names
    of the latter, which the user should know of. Others are left without values.
    """
    usual = [str(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    prefix = str(getattr(model, "base_model_prefix", ""))
    has_base = bool(prefix) and hasattr(model, prefix)
    owners: dict[str, nn.Module] = {}
    new = []
    for name in names:
        as_usual = any(re.search(pattern, name) for pattern in usual)
        on_top = "pooler" in name.split(".") or (has_base and not name.startswith(f"{prefix}."))
        if not (as_usual or on_top):
            continue
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        empty = torch.zeros_like(owner._parameters[key], device="cpu")
        owner._parameters[key] = nn.Parameter(empty, owner._parameters[key].requires_grad)
        owners[path] = owner
        new += [] if as_usual else [name]
    with torch.no_grad():
        for path, owner in model.named_modules():
            if path in owners:
                model._init_weights(owner)
    return new


def auto_class(config: Any, *, trust_remote_code: bool, gguf: bool) -> Any:
    """The class that a configuration names, else one that fits. SpecError if none is known."""
    import transformers

    told = getattr(config, "architectures", None) or ()
    named = [name for name in told if isinstance(name, str)]
    coded = getattr(config, "auto_map", None) or {}
    if coded and trust_remote_code:
        for auto, target in coded.items():
            if str(target).rpartition(".")[2] in named and auto.startswith("AutoModel"):
                return getattr(transformers, auto)
    for name in named:
        if (found := getattr(transformers, name, None)) is not None:
            return found
    if coded:
        raise SpecError(
            f"config.json names {named}, which comes with the model as code: give "
            "trust_remote_code=True, if you trust it, and the Auto class that the model's page "
            "says, such as cls=transformers.AutoModelForCausalLM"
        )
    # llama.cpp's files do not name a class: they are language models.
    of_text = transformers.AutoModelForCausalLM
    if gguf and type(config) in of_text._model_mapping:
        return of_text
    if named:
        raise SpecError(
            f"config.json names {named}, which this version of transformers does not have; give "
            "cls=, such as transformers.AutoModelForCausalLM"
        )
    return transformers.AutoModel
