# SPDX-License-Identifier: Apache-2.0
"""GGUF files as the host's models: blocks stay blocks on their donors, fetches decode them.

The host builds the model and finds its kind from shapes, as for any other file. Our layers take the
weights as they come; numbers are decoded in float32 and rounded once to what the model computes in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import nn

from distorch import _ops
from distorch._behaviour import attach_behaviour
from distorch._small_files import kind_of
from distorch.errors import FormatError
from distorch.formats.checkpoint import Checkpoint, open_checkpoint
from distorch.formats.naming.tracing import trace
from distorch.formats.stored import StoredTensor
from distorch.lora import StoredRows
from distorch.patching import with_rows
from distorch.runtime.module_agent import KEEP_SHARDED

SUFFIX = ".gguf"
_MODEL_PREFIX = "model.diffusion_model."
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WIDEST_KEPT_PLAIN = 1  # dimensions: biases and norms are decoded at once

# llama.cpp's names -> those of the host's text encoders, in the order in which they are replaced.
_T5 = {
    r"^enc\.blk\.(\d+)\.": r"encoder.block.\1.",
    r"^enc\.output_norm\.": "encoder.final_layer_norm.",
    r"^token_embd\.": "shared.",
    r"\.attn_(q|k|v|o)\.": r".layer.0.SelfAttention.\1.",
    r"\.attn_rel_b\.": ".layer.0.SelfAttention.relative_attention_bias.",
    r"\.attn_norm\.": ".layer.0.layer_norm.",
    r"\.ffn_gate\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.ffn_up\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.ffn_down\.": ".layer.1.DenseReluDense.wo.",
    r"\.ffn_norm\.": ".layer.1.layer_norm.",
}
_LLAMA = {
    r"^blk\.(\d+)\.": r"model.layers.\1.",
    r"^token_embd\.": "model.embed_tokens.",
    r"^output_norm\.": "model.norm.",
    r"^output\.": "lm_head.",
    r"\.attn_(q|k)_norm\.": r".self_attn.\1_norm.",
    r"\.attn_(q|k|v)\.": r".self_attn.\1_proj.",
    r"\.attn_output\.": ".self_attn.o_proj.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ffn_(gate|up|down)\.": r".mlp.\1_proj.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
}
_TEXT_NAMES = {
    "t5": _T5, "t5encoder": _T5, "llama": _LLAMA, "qwen2": _LLAMA, "qwen2vl": _LLAMA,
    "qwen3": _LLAMA, "qwen3vl": _LLAMA,
}  # fmt: skip


def file_names(*kinds: str) -> list[str]:
    """GGUF files in the host's folders of these kinds, by name."""
    found: set[str] = set()
    for folder in _folders(*kinds):
        if Path(folder).is_dir():
            names, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
            found |= {name for name in names if name.lower().endswith(SUFFIX)}
    return sorted(found)


def _folders(*kinds: str) -> list[str]:
    known = folder_paths.folder_names_and_paths
    return [folder for kind in kinds if kind in known for folder in known[kind][0]]


def full_path(name: str, *kinds: str) -> str:
    """The file of that name. FormatError.

    The name may be a stranger's: whoever can send a workflow can link any text to this input. So
    it cannot lead out of the folders, unless the owner has put a link there.
    """
    plain = PurePosixPath(name)
    leads_out = plain.is_absolute() or ".." in plain.parts
    for folder in () if leads_out else _folders(*kinds):
        path = Path(folder, name)
        if kind_of(path) == "file":
            return str(path)
    raise FormatError(f"{name!r:.300} is in none of the host's folders for {' and '.join(kinds)}")


class _TakesSharded:
    """A layer that takes a sharded weight as it is; the rest as the host's layers do."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], *rest: Any,
    ) -> None:  # fmt: skip
        key = f"{prefix}weight"
        value = state_dict.get(key)
        if value is None or not _ops.is_sharded(value):
            return super()._load_from_state_dict(  # type: ignore[misc]
                state_dict, prefix, metadata, strict, missing, *rest
            )
        set_sharded(self, "weight", value)
        others = {name: tensor for name, tensor in state_dict.items() if name != key}
        super()._load_from_state_dict(  # type: ignore[misc]
            others, prefix, metadata, strict, missing, *rest
        )
        if key in missing:
            missing.remove(key)
        return None


def set_sharded(owner: Any, name: str, value: torch.Tensor) -> None:
    """A parameter over a sharded tensor; state dicts give it out as it is, not decoded."""
    with torch.inference_mode(False):
        parameter = nn.Parameter(value.detach(), requires_grad=False)
    attach_behaviour(parameter)
    owner._parameters[name] = parameter
    owner.__dict__[KEEP_SHARDED] = True


class Operations(comfy.ops.manual_cast):
    """The host's layers, for weights that are decoded when they are fetched."""

    class Linear(_TakesSharded, comfy.ops.manual_cast.Linear):
        pass

    class Conv1d(_TakesSharded, comfy.ops.manual_cast.Conv1d):
        pass

    class Conv2d(_TakesSharded, comfy.ops.manual_cast.Conv2d):
        pass

    class Conv3d(_TakesSharded, comfy.ops.manual_cast.Conv3d):
        pass

    class Embedding(_TakesSharded, comfy.ops.manual_cast.Embedding):
        pass


class _Reader:
    """The tensors of one file on their way into a model that computes on `compute`."""

    def __init__(self, tensors: Mapping[str, StoredTensor], compute: torch.device) -> None:
        self.tensors, self.compute = tensors, compute

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Blocks sharded in their file, decoded to float32; other tensors plain, on the host."""
        return {name: self._tensor(name, torch.float32) for name in self.tensors}

    def _tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        stored = self.tensors[name]
        if stored.block_type is None:
            return stored.read()
        if len(stored.shape) <= _WIDEST_KEPT_PLAIN:
            values = _ops.dequantise(stored.read(), stored.block_type, torch.float32)
            return values.view(stored.shape)
        return self._decoded(name, stored, dtype)

    def _decoded(self, name: str, stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
        if stored.in_one_range:
            blocks = _ops.shard_file(
                stored.path, stored.offset, (stored.nbytes,), torch.uint8, compute=self.compute,
                name=name,
            )  # fmt: skip
        else:
            blocks = _ops.shard_host(stored.read(), self.compute, name)
        assert stored.block_type is not None
        return with_rows(blocks, StoredRows(stored.block_type), dtype, stored.shape, name)

    def decode_to(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Makes fetches give `dtype`, now that it is known what the model computes in."""
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is None or not _ops.is_sharded(parameter) or parameter.dtype == dtype:
                    continue
                name = _ops.state(parameter).name
                if name in self.tensors and _ops.state(parameter).decoded:
                    set_sharded(module, key, self._decoded(name, self.tensors[name], dtype))


def _without_prefix(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return inside or dict(tensors)


def _accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def load_model(path: str, device: str, dequant_dtype: str | None = None) -> Any:
    """A static patcher around the diffusion model of a GGUF file, computing on `device`.

    `dequant_dtype` "float32" | "float16" | "bfloat16": what fetches decode to, before the host
    casts it to what the model computes in; else that at once. FormatError.
    """
    checkpoint = open_checkpoint(path)
    reader = _Reader(_without_prefix(checkpoint.tensors, _MODEL_PREFIX), torch.device(device))
    load = comfy.sd.load_diffusion_model_state_dict
    options = {"custom_operations": Operations}
    patcher = load(
        reader.state_dict(), model_options=options, **_accepted(load, disable_dynamic=True)
    )
    if patcher is None:
        raise FormatError(
            f"{path!r}: the host does not know this kind of diffusion model "
            f"(architecture {checkpoint.metadata.get('general.architecture')!r})"
        )
    model = patcher.model
    computed = model.manual_cast_dtype or model.get_dtype()
    reader.decode_to(model, _DTYPES.get(dequant_dtype or "", computed))
    patcher.cached_patcher_init = (reload_model, (path, device, dequant_dtype))
    return patcher


def reload_model(path: str, device: str, dequant_dtype: str | None, **_: Any) -> Any:
    """What the host calls for a fresh copy."""
    return load_model(path, device, dequant_dtype)


def _text_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """A text encoder's tensors under the host's names."""
    architecture = checkpoint.metadata.get("general.architecture", "")
    names = _TEXT_NAMES.get(architecture)
    if names is None:
        raise FormatError(
            f"{checkpoint.path!r}: text encoders of architecture {architecture!r} cannot be read "
            f"from GGUF; known: {', '.join(_TEXT_NAMES)}. Take the safetensors file"
        )
    if names is _T5 and not any(".ffn_gate." in name for name in checkpoint.tensors):
        names = {**_T5, r"\.ffn_up\.": ".layer.1.DenseReluDense.wi."}
    heads = [_count(checkpoint, architecture, key) for key in ("head_count", "head_count_kv")]

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in tensors.items():
            match = re.search(r"\.attn_([qk])\.", name) if architecture == "llama" else None
            rows = _unpermuted(tensor, heads["qk".index(match[1])]) if match else tensor
            found[_renamed(name, names)] = rows
        return found

    return {name: traced.stored for name, traced in trace(checkpoint.tensors, convert)[0].items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


def _count(checkpoint: Checkpoint, architecture: str, key: str) -> int:
    name = f"{architecture}.attention.{key}"
    said = checkpoint.metadata.get(name, "1")
    if not re.fullmatch("[1-9][0-9]{0,5}", said):
        raise FormatError(f"{checkpoint.path!r}: its {name} is {said!r:.80}; expected a number")
    return int(said)


def _unpermuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the rotated halves of a head; the host has them one after another."""
    rows = tensor.shape[0]
    halves = tensor.reshape(heads, rows // heads // 2, 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def load_clip(paths: Iterable[str], clip_type: str, device: str) -> Any:
    """A CLIP of these files, GGUF or not, computing on `device`. FormatError."""
    readers, weights = [], []
    for path in paths:
        if path.lower().endswith(SUFFIX):
            checkpoint = open_checkpoint(path)
            readers.append(_Reader(_text_tensors(checkpoint), torch.device(device)))
            weights.append(readers[-1].state_dict())
        else:
            weights.append(comfy.utils.load_torch_file(path, safe_load=True))
    kinds = comfy.sd.CLIPType
    load = comfy.sd.load_text_encoder_state_dicts
    clip = load(
        state_dicts=weights,
        clip_type=getattr(kinds, clip_type.upper(), kinds.STABLE_DIFFUSION),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={
            "custom_operations": Operations,
            "initial_device": torch.device("cpu"),
            "load_device": torch.device(device),
        },
        **_accepted(load, disable_dynamic=True),
    )
    for reader in readers:
        reader.decode_to(clip.patcher.model, management.text_encoder_dtype(torch.device(device)))
    return clip
