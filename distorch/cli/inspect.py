"""What is in a checkpoint: dtypes, bytes, quantisation, LoRA kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from distorch._tables import human_bytes, text_table
from distorch.formats.checkpoint import Checkpoint, dtype_name, open_checkpoint
from distorch.formats.safetensors import StoredTensor

_LORA_MARKS = {
    ".lora_A.": "LoRA (PEFT spelling)", ".lora_down.": "LoRA (kohya spelling)",
    ".hada_w1_a": "LoHa", ".lokr_w1": "LoKr", ".dora_scale": "DoRA", ".magnitude_vector": "DoRA",
    ".oft_": "OFT",
}  # fmt: skip
_SHOWN = 5


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

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.kind}, {self.tensors} tensors, {human_bytes(self.total_bytes)}",
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
        if self.lora_ranks:
            ranks = ", ".join(
                f"{rank} ({count} targets)" for rank, count in self.lora_ranks.items()
            )
            lines.append(f"\nrank: {ranks}")
        if self.metadata:
            lines.append(
                "\nmetadata: " + ", ".join(f"{k}={v[:60]}" for k, v in self.metadata.items())
            )
        return "\n".join(lines)


def inspect_file(path: str) -> Contents:
    """Reads headers only. FormatError when the file is damaged or of an unknown kind."""
    checkpoint = open_checkpoint(path, quantised=True)
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
    )


def _bytes_by_dtype(tensors: list[StoredTensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[dtype_name(tensor)] += tensor.nbytes
    return dict(counts.most_common())


def _kind(checkpoint: Checkpoint) -> str:
    for mark, kind in _LORA_MARKS.items():
        if any(mark in f"{name}." for name in checkpoint.tensors):
            return kind
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
    downs = [t for t in tensors if ".lora_A." in t.name or ".lora_down." in t.name]
    return dict(Counter(t.shape[0] for t in downs if t.shape).most_common())
