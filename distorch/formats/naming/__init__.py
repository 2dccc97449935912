# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under names that are not the module's: original files, llama.cpp's GGUF files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product

from torch import nn

from distorch.errors import FormatError
from distorch.formats.checkpoint import Checkpoint
from distorch.formats.naming import diffusers_names, llama_cpp, transformers_names
from distorch.formats.naming.part_scales import scales_of_part, take_scales
from distorch.formats.naming.tracing import ConversionError, Convert, NamesDoNotFitError, trace
from distorch.formats.plain_names import PREFIXES, match_names
from distorch.formats.stored import StoredTensor

__all__ = ["ConversionError", "fit_names"]

Tensors = Mapping[str, StoredTensor]


def fit_names(checkpoint: Checkpoint, module: nn.Module) -> Checkpoint:
    """The checkpoint under the module's names, or as it is where they fit or no rule is known.

    Weights that the module keeps in several, or in another order of rows, become ranges or pieces
    of the stored ones; nothing but the header is read (and norms that a format shifts by one).
    FormatError when the names are known and a weight cannot be had without computing it.
    """
    fitting = match_names(checkpoint.tensors, _names(module))
    have = {name: checkpoint.tensors[stored] for name, stored in fitting.items()}
    as_it_is = _filled(module, have)
    if as_it_is == _filled(module, _names(module)):
        return _of_other_layout(checkpoint, module, have)
    best, most, refusal = None, len(as_it_is), None
    tries = product(_conversions(module, checkpoint), _parts(checkpoint.tensors))
    for convert, tensors in tries:
        try:
            found = _renamed(tensors, convert)
        except NamesDoNotFitError:
            continue
        except FormatError as error:
            refusal = refusal or error
            continue
        filled = len(_filled(module, found))
        if filled > most:
            best, most = found, filled
    if best is None and refusal is not None:
        raise refusal
    return checkpoint if best is None else replace(checkpoint, tensors=best)


def _of_other_layout(checkpoint: Checkpoint, module: nn.Module, have: Tensors) -> Checkpoint:
    """A file that has all of the module's names, in the module's layout. For some models of
    transformers, files have another layout under the same names; their shapes tell.
    """
    convert = None
    if _misshapen(module, have) and not checkpoint.is_gguf:
        convert = transformers_names.conversion_for(module)
    if convert is None:
        return checkpoint
    try:
        found = _renamed(checkpoint.tensors, convert)
    except NamesDoNotFitError:
        return checkpoint
    return checkpoint if _misshapen(module, found) else replace(checkpoint, tensors=found)


def _misshapen(module: nn.Module, have: Tensors) -> bool:
    """Whether a weight that is not quantised has another shape in the file than in the module."""
    return any(
        name in have
        and have[name].block_type is None
        and have[name].shape != tuple(parameter.shape)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    )


def _conversions(module: nn.Module, checkpoint: Checkpoint) -> Iterator[Convert]:
    """What the libraries that know such modules would do with the file's names."""
    yield from diffusers_names.conversions_for(module)
    of_gguf = llama_cpp.conversion_for(module, checkpoint.metadata)
    of_hub = transformers_names.conversion_for(module)
    yield from filter(None, [of_gguf or of_hub])


def _names(module: nn.Module) -> list[str]:
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return parameters + [name for name, _ in module.named_buffers(remove_duplicate=False)]


def _filled(module: nn.Module, names: Iterable[str]) -> set[int]:
    """The parameters that these names bring, a tied one once."""
    have = set(names)
    named = module.named_parameters(remove_duplicate=False)
    return {id(parameter) for name, parameter in named if name in have}


def _parts(tensors: Tensors) -> Iterator[dict[str, StoredTensor]]:
    """What the module's weights may be in a file: all under one prefix, or the whole."""
    for prefix in PREFIXES:
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if part:
            yield part
    yield dict(tensors)


def _renamed(tensors: Tensors, convert: Convert) -> dict[str, StoredTensor]:
    """The tensors that the conversion makes, and those that it should have taken and did not."""
    weights, scales = take_scales(tensors)
    found, left = trace(weights, convert)
    renamed = {name: traced.stored for name, traced in found.items()}
    for name, traced in found.items():
        renamed |= scales_of_part(name, traced.runs, scales)
    used = {_top(name) for name in weights.keys() - set(left)}
    # Others belong to other models in the same file: a decoder, text encoders, an output head.
    unknown = {name: weights[name] for name in left if _top(name) in used}
    return unknown | renamed


def _top(name: str) -> str:
    return name.partition(".")[0]
