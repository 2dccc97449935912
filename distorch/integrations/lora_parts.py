# SPDX-License-Identifier: Apache-2.0
"""A LoRA file for several parts of a pipeline, part by part."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from distorch.errors import FormatError, SpecError
from distorch.integrations.budget import by_use
from distorch.lora import (
    LoraFile,
    LoraSource,
    checked_loras,
    identity_of,
    parts_of_lora,
    read_lora,
)

PipelineLora = tuple[LoraSource, float] | tuple[LoraSource, float, str]
PartLoras = dict[str, list[tuple[LoraSource, float]]]

# What a LoRA calls parts other than the main one, and which part that may be. FLUX has its T5 as
# the second text encoder.
_OTHERS = {
    "text 1": ("text_encoder",),
    "text 2": ("text_encoder_2",),
    "text 3": ("text_encoder_3", "text_encoder_2"),
    "reference": ("transformer_ref",),
}


class LoraSplitter:
    """Splits LoRAs by the parts of one pipeline. For a file that it has read before, it returns the
    same objects: `set_loras` then sees that at most the strength has changed.
    """

    def __init__(self, parts: Collection[str]) -> None:
        self.parts = list(parts)
        self._known: dict[object, dict[str, LoraFile]] = {}

    def split(self, loras: Sequence[PipelineLora], strict: bool = True) -> PartLoras:
        """Part -> its share of each LoRA, with the strength. SpecError, FormatError.

        With `strict`, keys for a part that the pipeline does not have are an error.
        """
        found: PartLoras = {part: [] for part in self.parts}
        known: dict[object, dict[str, LoraFile]] = {}
        for source, strength, part in checked_loras(loras, of_parts=True):
            if part and part not in self.parts:
                raise SpecError(
                    f"loras: there is no part {part!r}; this pipeline has {', '.join(self.parts)}"
                )
            key = (identity_of(source), part, strict)
            known[key] = shares = self._known.get(key) or self._shares(source, part, strict)
            for name, share in shares.items():
                found[name].append((share, strength))
        self._known = known
        return found

    def _shares(self, source: LoraSource, part: str, strict: bool) -> dict[str, LoraFile]:
        file = read_lora(source)
        if part:
            return {part: file}
        main = by_use(self.parts)[0]
        shares: dict[str, LoraFile] = {}
        for component, share in parts_of_lora(file).items():
            may_be = _OTHERS.get(component, (main,))
            name = next((name for name in may_be if name in self.parts), may_be[0])
            if name in self.parts:
                # Keys without a part's name and keys with the main part's name come here.
                shares[name] = share if name not in shares else _both(shares[name], share)
            elif strict:
                shown = ", ".join(list(share.tensors)[:3])
                raise FormatError(
                    f"{file.label} has keys for {name!r} ({shown}), and this pipeline has "
                    f"{', '.join(self.parts)}; strict_loras=False passes them over"
                )
        return shares


def _both(one: LoraFile, other: LoraFile) -> LoraFile:
    return LoraFile(one.label, {**one.tensors, **other.tensors}, one.configuration)
