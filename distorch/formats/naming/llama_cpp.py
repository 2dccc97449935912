# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's names in GGUF files -> those of a transformers module.

The names are those of the gguf package, the order of rows that of transformers' own reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from distorch.errors import FormatError
from distorch.formats.naming.tracing import Convert

_ENDINGS = ("weight", "bias")
# Metadata's general.architecture, where the gguf package calls it otherwise.
_ARCHITECTURES = {"gpt_oss": "gpt-oss"}


def conversion_for(module: nn.Module, metadata: Mapping[str, str]) -> Convert | None:
    """From a file of this metadata to the module's names; None if they are not of that kind."""
    architecture = metadata.get("general.architecture")
    config = getattr(module, "config", None)
    ours = any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__)
    if architecture is None or config is None or not ours:
        return None
    text = config.get_text_config()
    names = _names(module, architecture, _layers(text))
    if not names:
        return None
    processor = _processor(architecture, text)
    return lambda checkpoint: _converted(checkpoint, names, processor)


def _names(module: nn.Module, architecture: str, layers: int) -> dict[str, str]:
    """Name in the file -> name in the module, of every parameter that such files have."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError as error:
        raise FormatError(
            f"a GGUF file with llama.cpp's names ({architecture!r}) needs the gguf package to be "
            "loaded into a transformers module: pip install gguf"
        ) from error
    wanted = _ARCHITECTURES.get(architecture, architecture)
    kind = next((kind for kind, name in MODEL_ARCH_NAMES.items() if name == wanted), None)
    if kind is None:
        return {}
    known = get_tensor_name_map(kind, layers)
    keys = list(dict(module.named_parameters(remove_duplicate=False)))
    found: dict[str, str] = {}
    # Parts of a bigger model have their names from "model." or "model.language_model." on.
    for prefix in sorted(_prefixes(keys), key=len):
        for key in keys:
            stem, _, ending = key.removeprefix(prefix).rpartition(".")
            if not key.startswith(prefix) or ending not in _ENDINGS or key in found.values():
                continue
            name = known.get_name(stem)
            if name is not None:
                found.setdefault(f"{name}.{ending}", key)
    return found


def _prefixes(keys: Iterable[str]) -> set[str]:
    """ "", "model.", "model.language_model.": what stands before the list of layers."""
    found = {""}
    for key in keys:
        parts = key.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            found |= {".".join([*parts[:end], ""]) for end in range(1, number)}
    return found


def _layers(config: Any) -> int:
    counts = (getattr(config, key, 0) for key in ("num_hidden_layers", "num_decoder_layers"))
    return max(int(count or 0) for count in counts)


def _processor(architecture: str, config: Any) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    return kind(config=config.to_dict())


def _converted(
    checkpoint: dict[str, torch.Tensor], names: Mapping[str, str], processor: Any
) -> dict[str, torch.Tensor]:
    found = {}
    for stored, name in names.items():
        if stored not in checkpoint:
            continue
        try:
            result = processor.process(weights=checkpoint[stored], name=stored)
        except (TypeError, AttributeError, KeyError) as error:
            raise _refusal(stored, str(error)) from error
        if result.name != stored:
            raise _refusal(stored, "it is stored as several weights of the module, or they as it")
        found[name] = result.weights
    return found


def _refusal(name: str, why: str) -> FormatError:
    return FormatError(
        f"{name!r}: transformers changes more than the order of its rows ({why}); convert the file "
        "with transformers (from_pretrained with gguf_file=, then save_pretrained) and load that"
    )
