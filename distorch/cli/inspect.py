# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint: dtypes, bytes, quantisation, LoRA kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distorch.display.tables import human_bytes, shortened, text_table
from distorch.errors import printable
from distorch.formats.checkpoint import (
    Checkpoint,
    dtype_name,
    is_no_weight,
    open_checkpoint,
)
from distorch.formats.quantisation import declared_name
from distorch.formats.stored import StoredTensor
from distorch.lora.files import read_lora
from distorch.lora.resolve import resolve, sizes_of
from distorch.lora.spellings import kind_of, looks_like_patches, spelling_of, split_key
from distorch.lora.targets import Targets, WeightKinds

_SHOWN, _LONGEST_NAME = 5, 160
# Weights that a control LoRA may make wider: the layers that take the latents.
_INPUTS = ("x_embedder.weight", "img_in.weight")
_GATED, _DOWN = ("gate_proj", "up_proj", "w1", "w3"), ("down_proj", "w2")
_EXPERT_WEIGHT = re.compile(rf"(.+\.experts)\.(\d+)\.(?:{'|'.join((*_GATED, *_DOWN))})\.weight$")


@dataclass(frozen=True)
class Contents:
    """Facts about one file; sizes in bytes."""

    path: str
    kind: str
    tensors: int
    total_bytes: int
    dtypes: dict[str, int]
    lora_ranks: dict[int, int]
    largest: list[tuple[str, str, int]]
    metadata: dict[str, str]
    passed_over: list[str]
    formats: dict[str, int]  # that the file declares -> tensors
    fits: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            printable(f"{self.path}: {self.kind}, {self.tensors} tensors, ")
            + human_bytes(self.total_bytes),
            "",
            text_table(
                ("dtype", "bytes", "size", "share"),
                [
                    (k, str(v), human_bytes(v), f"{v / max(1, self.total_bytes):.1%}")
                    for k, v in self.dtypes.items()
                ],
            ),
            "",
            text_table(("largest", "shape", "bytes"), [(n, s, str(b)) for n, s, b in self.largest]),
        ]
        if self.formats:
            told = ", ".join(
                f"{printable(name)} ({count} tensors)" for name, count in self.formats.items()
            )
            lines.append(f"\ndeclared formats (comfy_quant): {told}")
        if self.passed_over:
            named = [shortened(name, _LONGEST_NAME) for name in self.passed_over[:_SHOWN]]
            if len(self.passed_over) > _SHOWN:
                named.append(f"and {len(self.passed_over) - _SHOWN} more")
            lines.append(f"\nno weights, passed over: {', '.join(named)}")
        if self.lora_ranks:
            ranks = ", ".join(
                f"{rank} ({count} targets)" for rank, count in self.lora_ranks.items()
            )
            lines.append(f"\nrank: {ranks}")
        if self.fits is not None:
            lines.append(
                f"\nfits {self.fits['checkpoint']}: {self.fits['targets']} targets on "
                f"{self.fits['weights']} weights; for other models {self.fits['elsewhere']}, "
                f"fit nothing {len(self.fits['unmatched'])}"
            )
            lines += [
                f"  {shortened(stem, _LONGEST_NAME)}" for stem in self.fits["unmatched"][:_SHOWN]
            ]
            if self.fits["sizes"]:
                lines.append(f"  {self.fits['sizes']}")
        if self.metadata:
            lines.append(
                "\nmetadata: "
                + ", ".join(
                    shortened(f"{k}={v[:60]}", _LONGEST_NAME) for k, v in self.metadata.items()
                )
            )
        return "\n".join(lines)


def inspect_file(path: str, fits: str | None = None) -> Contents:
    """Reads headers only; of a LoRA that is held against the checkpoint `fits`, all of it.

    FormatError when a file is damaged, of an unknown kind, or does not fit.
    """
    checkpoint = open_checkpoint(path)
    tensors = list(checkpoint.tensors.values())
    largest = sorted(tensors, key=lambda tensor: -tensor.nbytes)[:_SHOWN]
    return Contents(
        path=str(path),
        kind=_kind(checkpoint),
        tensors=len(tensors),
        total_bytes=checkpoint.total_bytes,
        dtypes=_bytes_by_dtype(tensors),
        lora_ranks=_ranks(tensors),
        largest=[(t.name, "x".join(map(str, t.shape)) or "scalar", t.nbytes) for t in largest],
        metadata=checkpoint.metadata,
        formats=dict(
            Counter(declared_name(t.declared) for t in tensors if t.declared).most_common()
        ),
        passed_over=[name for name in checkpoint.tensors if is_no_weight(name)],
        fits=_fits(path, fits) if fits is not None else None,
    )


def _fits(lora: str, checkpoint: str) -> dict[str, Any]:
    """How many targets of a LoRA fit the weights that a checkpoint holds."""
    shapes = {name: tuple(t.shape) for name, t in open_checkpoint(checkpoint).tensors.items()}
    inputs = frozenset(n for n, shape in shapes.items() if n.endswith(_INPUTS) and len(shape) == 2)
    stacks = _stacks(shapes)
    kinds = WeightKinds(experts=frozenset(stacks), inputs=inputs)
    targets = Targets(shapes | stacks, kinds)
    found = resolve(read_lora(lora), targets)
    return {
        "checkpoint": checkpoint,
        "targets": len({patch.stem for patch in found.patches}),
        "weights": len({patch.weight for patch in found.patches}),
        "elsewhere": len(found.elsewhere),
        "unmatched": found.left_out,
        "sizes": sizes_of(found, targets),
    }


def _stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Experts that a checkpoint keeps one by one, as the stacks that transformers makes of them."""
    experts: dict[str, set[str]] = {}
    for name in shapes:
        if found := _EXPERT_WEIGHT.match(name):
            experts.setdefault(found[1], set()).add(found[2])
    stacks: dict[str, tuple[int, ...]] = {}
    for module, numbers in experts.items():
        for parts, stack in (_GATED, "gate_up_proj"), (_DOWN, "down_proj"):
            first = [shapes.get(f"{module}.0.{part}.weight") for part in parts]
            known = [shape for shape in first if shape is not None and len(shape) == 2]
            if known:
                rows = sum(shape[0] for shape in known)
                ours = module.replace("block_sparse_moe.", "mlp.")  # Mixtral's older name
                stacks[f"{ours}.{stack}"] = (len(numbers), rows, known[0][1])
    return stacks


def _bytes_by_dtype(tensors: list[StoredTensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[dtype_name(tensor)] += tensor.nbytes
    return dict(counts.most_common())


def _kind(checkpoint: Checkpoint) -> str:
    if looks_like_patches(checkpoint.tensors):
        splits = [split for name in checkpoint.tensors if (split := split_key(name)) is not None]
        parts = {part for _, part in splits}
        spelling = spelling_of(checkpoint.tensors)
        return f"{kind_of(parts)} ({spelling} spelling)" if spelling else kind_of(parts)
    if architecture := checkpoint.metadata.get("general.architecture"):
        return f"GGUF checkpoint, architecture {architecture[:40]}"
    names = checkpoint.tensors
    if any(
        tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point for tensor in names.values()
    ):
        scaled = any(name.endswith(("scale_weight", "weight_scale")) for name in names)
        return "fp8 checkpoint with scales" if scaled else "fp8 checkpoint"
    return "checkpoint"


def _ranks(tensors: list[StoredTensor]) -> dict[int, int]:
    """Targets by rank, where a factor shows it."""
    ranks = []
    for tensor in tensors:
        _, part = split_key(tensor.name) or ("", "")
        if part in _RANK_IS_FIRST and tensor.shape:
            ranks.append(tensor.shape[0])
    return dict(Counter(ranks).most_common())


_RANK_IS_FIRST = ("down", "hada_w1_b", "lokr_w2_b", "embedding_a")
