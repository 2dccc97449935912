# SPDX-License-Identifier: Apache-2.0
"""How LoRA files spell their keys: `stem` (which module) and part (what of the patch)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from distorch.errors import FormatError

# Longest first; `ADAPTER` stands for the adapter's name that PEFT may put there.
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_ENDINGS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "peft_magnitude"),
    (rf"\.lora_embedding_A{_ADAPTER}", "embedding_a"),
    (rf"\.lora_embedding_B{_ADAPTER}", "embedding_b"),
    (rf"\.lora_A{_ADAPTER}\.weight", "down"),
    (rf"\.lora_B{_ADAPTER}\.weight", "up"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
    (r"\.lora_A", "down"),
    (r"\.lora_B", "up"),
    (r"[._]lora\.down\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_up\.bias", "up_bias"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_linear_layer\.up\.weight", "up"),
    (r"(?<=_lora[12])\.down\.weight", "down"),
    (r"(?<=_lora[12])\.up\.weight", "up"),
    (r"\.down\.weight", "down_plain"),
    (r"\.up\.weight", "up_plain"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "magnitude"),
    (rf"\.(hada_(?:w[12]_[ab]|t[12])){_ADAPTER}", ""),
    (rf"\.(lokr_(?:w[12](?:_[ab])?|t2)){_ADAPTER}", ""),
    (r"\.(oft_blocks|rescale)", ""),
    (r"\.oft_diag", "oft_blocks"),
    (rf"\.oft_R{_ADAPTER}\.weight", "oft_r"),
    (rf"\.boft_R{_ADAPTER}", "boft_r"),
    (rf"\.boft_s{_ADAPTER}", "boft_s"),
    (r"\.([ab][12])\.weight", ""),
    (r"\.(diff|diff_b|diff_m|set_weight)", ""),
    # Norms that FLUX's control LoRAs bring whole, as their authors and as diffusers name them.
    (r"(?<=\.query_norm)\.scale", "set_weight"),
    (r"(?<=\.key_norm)\.scale", "set_weight"),
    (r"(?<=\.norm_[qk])\.weight", "set_weight"),
    (r"(?<=\.norm_added_[qk])\.weight", "set_weight"),
    (r"\.w_norm", "diff"),
    (r"\.b_norm", "diff_b"),
)
_ADAPTER_NAME = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")
_PATTERNS = [(re.compile(f"^(.+?){ending}$"), part) for ending, part in _ENDINGS]
# Parts that carry nothing of a weight, or what the factors show, too (`reshape_weight`: how wide a
# layer gets), and the embeddings that trainers put into the same file.
_IGNORED = re.compile(
    r"(\.(lora_te|lora_unet)_?version|\.reg|\.bypass_mode|\.initial_norm|\.reshape_weight)$"
    r"|^bundle_emb\."
)


@dataclass
class Group:
    """The parts of one target, by name (down, up, mid, alpha, magnitude, ...), and their keys."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def adapter(self) -> str:
        """The adapter's name, where the keys have one."""
        found = map(_ADAPTER_NAME.search, self.keys.values())
        return next((name.group(1) for name in found if name), "")

    def put(self, part: str, tensor: Tensor, key: str) -> None:
        """One more part. FormatError if it is there already and says something else."""
        known = self.parts.get(part)
        if known is not None and not _equal(known, tensor):
            raise FormatError(
                f"{self.keys[part]!r} and {key!r} are the same factor of one target, and differ: "
                "a file with several adapters in it is read one adapter at a time; keep the keys "
                "of one"
            )
        self.parts.setdefault(part, tensor)
        self.keys.setdefault(part, key)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.float() == other.float()).all())


def split_key(key: str) -> tuple[str, str] | None:
    """(stem, part) of one key, or None when it is no part of a patch."""
    for pattern, part in _PATTERNS:
        found = pattern.match(key)
        if found:
            return found.group(1), part or found.group(2)
    return None


def group_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Group], list[str]]:
    """The parts by stem, in file order, and the keys that are no part of a patch. FormatError where
    two keys contradict each other.
    """
    groups: dict[str, Group] = {}
    unknown = []
    splits = filter(None, map(split_key, tensors))
    embeddings = {stem for stem, part in splits if part == "embedding_a"}
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            if not _IGNORED.search(key):
                unknown.append(key)
            continue
        stem, part = split
        if part == "diff_m":  # of the table of modulations that a block keeps
            stem, part = f"{stem}.modulation", "diff"
        group = groups.setdefault(stem, Group())
        if part == "peft_magnitude":
            group.put("magnitude", _with_axis(tensor, stem in embeddings), key)
        elif part in ("embedding_a", "embedding_b"):
            if tensor.dim() != 2:
                raise FormatError(f"{key!r} has the shape {list(tensor.shape)}; expected a matrix")
            # They are kept as [rank, rows] and [columns, rank]: the weight is (B @ A) turned over.
            group.put("up" if part == "embedding_a" else "down", tensor.t(), key)
        else:
            group.put(part.removesuffix("_plain"), tensor, key)
    return groups, unknown


def _with_axis(magnitude: Tensor, embedding: bool) -> Tensor:
    """PEFT's magnitude in a shape that says what it is for: [outputs, 1] or [1, columns].

    PEFT has one number per output, of an embedding one per column. For convolutions it writes
    [1, outputs, 1, 1]. LyCORIS uses that shape for inputs.
    """
    return magnitude.reshape(1, -1) if embedding else magnitude.reshape(-1, 1)


def looks_like_patches(names: Iterable[str]) -> bool:
    """Whether keys are those of a LoRA file rather than a checkpoint's."""
    parts = {split[1] for name in names if (split := split_key(name)) is not None}
    common = {"alpha", "down_plain", "up_plain", "rescale", "a1", "a2", "b1", "b2", "set_weight"}
    return bool(parts - common)


def spelling_of(names: Iterable[str]) -> str:
    """Who writes such keys, in a word; "" when that is not known."""
    joined = "\n".join(names)
    marks = (
        ("lycoris_", "LyCORIS"), ("lora_unet_", "kohya"), ("lora_te", "kohya"),
        ("lora_transformer_", "kohya"), ("processor.", "XLabs or old diffusers"),
        ("base_model.model.", "PEFT"), ("diffusion_model.", "ComfyUI"),
        ("transformer.", "diffusers"), ("unet.", "diffusers"), (".lora_A", "PEFT"),
        (".lora_down", "kohya"),
    )  # fmt: skip
    return next((name for mark, name in marks if mark in joined), "")


_KIND_OF_PART = (
    ("magnitude", "DoRA"), ("peft_magnitude", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"),
    ("lokr_w1_a", "LoKr"), ("oft_blocks", "OFT"), ("oft_r", "OFT"), ("boft_r", "BOFT"),
    ("a1", "GLoRA"), ("up", "LoRA"), ("diff", "difference"), ("diff_b", "difference"),
    ("set_weight", "replacement"),
)  # fmt: skip


def kind_of(parts: Iterable[str]) -> str:
    """The kind that parts of these names make up, as a word for people."""
    have = set(parts)
    return next((kind for part, kind in _KIND_OF_PART if part in have), "unknown")
