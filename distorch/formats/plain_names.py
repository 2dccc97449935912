# SPDX-License-Identifier: Apache-2.0
"""Names as a module has them.

Files put prefixes before them. Wrappers put steps into them: torch.compile, FSDP, checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

# Prefixes that whole-model files put before the names of the module's own weights.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(name: str) -> str:
    """A name of a weight or module as it is in the module that was wrapped."""
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def base_name(name: str) -> str:
    """The name of a weight before PEFT put it under an adapter, or under several."""
    return re.sub(r"(\.base_layer)+\.", ".", name) if ".base_layer." in name else name


def match_names(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Wanted name -> stored name, with the prefix stripped that makes most names fit, and without
    what wrappers put into either.
    """
    plain = {unwrapped(name): name for name in stored}
    asked = {unwrapped(name): name for name in wanted}
    return {asked[name]: plain[found] for name, found in _fitting(plain, list(asked)).items()}


def _fitting(have: Collection[str], need: Sequence[str]) -> dict[str, str]:
    best: dict[str, str] = {}
    for prefix in ("", *PREFIXES, *_other_prefixes(have, need)):
        if best and len(best) == len(need):
            break
        fits = {name: prefix + name for name in need if prefix + name in have}
        if len(fits) > len(best):
            best = fits
    return best


def _other_prefixes(have: Collection[str], need: Sequence[str]) -> Iterator[str]:
    """What stands before some of the wanted names in the file: "text_encoders.t5xxl."."""
    seen = set()
    for name in (*need[:1], *need[len(need) // 2 :][:1], *need[-1:]):
        for key in have:
            prefix = key.removesuffix(name)
            if prefix != key and prefix.endswith(".") and prefix not in seen:
                seen.add(prefix)
                yield prefix
