# SPDX-License-Identifier: Apache-2.0
"""load_pretrained: models of transformers, streamed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from distorch import api
from distorch.display.progress import Progress, check_progress
from distorch.errors import FormatError, SpecError, warn_at_caller
from distorch.formats.checkpoint import Checkpoint, open_checkpoint
from distorch.formats.naming import ConversionError
from distorch.formats.plain_names import match_names
from distorch.formats.stored import StoredTensor, same_bytes
from distorch.integrations.empty_models import (
    auto_class,
    empty_transformers_model,
    give_initial_values,
)
from distorch.integrations.hub import check_model, check_no_other_file, folder_of
from distorch.integrations.trust import check_json, naming
from distorch.integrations.weights import floating_dtype, lacking, weights_file
from distorch.loading.loader import fill
from distorch.loading.prepare import FillOptions, Request, open_for, prepare
from distorch.lora import LoraSource
from distorch.patching import set_loras
from distorch.runtime.options import dtype_of

_LOG = logging.getLogger("distorch")
_SHOWN = 4
_ARGUMENTS = (
    "spec", "dtype", "loras", "file", "cls", "revision", "subfolder", "trust_remote_code",
    "virtual_vram", "donor", "progress", *FillOptions.__annotations__,
)  # fmt: skip
# Of a repository: no weights of other libraries, nothing of other folders.
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")


def load_pretrained(
    model: str,
    spec: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    loras: Sequence[tuple[LoraSource, float]] = (),
    file: str | None = None,
    cls: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    trust_remote_code: bool = False,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    progress: Progress = None,
    **options: Unpack[FillOptions],
) -> nn.Module:
    """Loads a model of transformers, each weight straight to its place.

    Example::

        model = load_pretrained("Qwen/Qwen3-8B", "cuda:0,6gb;cpu,*")

    The model is in eval mode, and gives the bits of `cls.from_pretrained(model, dtype=dtype)`. It
    is never whole in RAM, unless transformers computes with the weights when it reads them. Then
    transformers loads it, and it is distributed afterwards (logged as a warning).

    Args:
        model: A folder, an id of the hub, or a GGUF file. An id is looked up in the local cache,
            and downloaded only if it is not there.
        spec: A placement string, such as "cuda:0,6gb;cpu,*". If not given, or "auto": as much on
            the compute device as its free memory allows.
        dtype: "auto" is what config.json says, or else what most of the weights are.
        loras: Pairs of a LoRA (a file or a state dict) and its strength.
        file: Takes the weights from this file of the repository, or of this disk.
        cls: A class of transformers, an Auto class, or the name of one. If not given, the one that
            config.json names.
        revision: A branch, tag or commit of the hub.
        subfolder: A folder inside of the repository.
        trust_remote_code: Lets transformers run code that comes with the model.
        virtual_vram: Bytes to give away, in place of a spec.
        donor: Where the bytes of `virtual_vram` go.
        progress: As in `distorch.distribute`.
        options: `lora_mode`, `strict_loras`, `patched_dtype`, `resident`, `verify` as in
            `distorch.load`; `compute`, `order`, `keep`, `offload`, `rules`, `prefetch`, `min_bytes`
            as in `distorch.distribute`. `min_bytes` is "auto" here: small weights leave, too, if
            the spec asks for it.

    Returns:
        The model, an object of transformers' own class.

    Raises:
        SpecError: The spec or an option is wrong.
        FormatError: A file is missing, damaged, or does not fit the model.
        PlacementError: The placement cannot be done.
        FetchError: A file could not be read, or a donor failed.

    After any of them nothing is left behind.
    """
    check_progress(progress)
    text = check_model(model)
    wish = Request.for_new_module(spec, virtual_vram, donor, options, _ARGUMENTS, loras=loras)
    wish.check()
    found = find(text, file, revision, subfolder)
    cls = None if cls is None else _checked_class(cls)
    config = found.config(cls, trust_remote_code)
    if cls is None:
        cls = auto_class(config, trust_remote_code=trust_remote_code, gguf=found.gguf)
    wanted = dtype_for(dtype, config, found.weights)
    remote = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        with wish.verifying(found.weights, progress):
            module, checkpoint = empty_pretrained(cls, config, wanted, found.weights, **remote)
            _read_generation_config(module, found)
            return fill(module, prepare(module, checkpoint, wish), progress=progress)
    except ConversionError as error:
        if found.weights != weights_file(found.folder):
            raise  # another file than transformers would take
        _LOG.warning("transformers loads %s whole, then it is distributed: %s", found.folder, error)
        wish.compare(found.weights, progress)
        whole = cls.from_pretrained(found.folder, dtype=wanted, **remote).eval()
        return _distributed(whole, wish, progress)


@dataclass(frozen=True)
class Found:
    """Where the files of a model are: its folder, and what has its weights."""

    folder: Path
    weights: Path
    gguf: bool

    def config(self, cls: Any = None, trust_remote_code: bool = False) -> Any:
        """The configuration for a class; that of a GGUF file where there is no config.json."""
        from transformers import AutoConfig

        # The class of a part (a text encoder) takes its part of a composite configuration.
        reader = getattr(cls, "config_class", None) or AutoConfig
        where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if not (self.folder / "config.json").is_file():
            if not self.gguf:
                raise FormatError(f"{str(self.folder)!r} has no config.json")
            open_checkpoint(self.weights)  # says what is wrong with a damaged file
            where["gguf_file"] = self.weights.name
        check_json(self.folder, "config.json")
        try:
            return reader.from_pretrained(self.folder, **where)
        except Exception as error:  # on values that make no sense it raises anything
            file = self.folder / "config.json"
            of_diffusers = file.is_file() and "_diffusers_version" in file.read_text()
            hint = ". It is of a model of diffusers: load_pipeline, or distorch.load" * of_diffusers
            raise FormatError(
                f"transformers cannot read the configuration in {str(self.folder)!r}: {error}{hint}"
            ) from error


def find(model: str, file: str | None, revision: str | None, subfolder: str | None) -> Found:
    """The files of a model. SpecError, FormatError."""
    here = Path(model).expanduser()
    check_no_other_file(
        here, (".gguf",), "the folder that it is in (its config.json says what model it is); file= "
        "names another file with weights"
    )  # fmt: skip
    if here.suffix == ".gguf" and here.is_file():
        if file is not None:
            raise SpecError(f"file={file!r}: {model!r} is a file already; give one of them")
        return Found(here.parent, here, gguf=True)
    if file is not None and Path(file).expanduser().is_file():
        weights = Path(file).expanduser()
        folder = _folder(model, revision, subfolder, _lacks_config)
        return Found(folder, weights, weights.suffix == ".gguf")
    if file is not None:
        folder = _folder(model, revision, subfolder, lambda f: _lacks_file(f, file), file)
        return Found(folder, folder / file, file.endswith(".gguf"))
    folder = _folder(model, revision, subfolder, _lacks_model)
    weights = weights_file(folder)
    return Found(folder, weights, weights.suffix == ".gguf")


def _folder(
    model: str, revision: str | None, subfolder: str | None, lacks: Any, file: str | None = None
) -> Path:
    inside = subfolder or ""

    def download() -> str:
        from huggingface_hub import snapshot_download

        prefix = f"{inside}/" if inside else ""
        # Of one of several numbered parts, all parts.
        named = [prefix + re.sub(r"-\d{5}-of-", "-*-of-", file)] if file else None
        weights = named or _weights_of(model, revision, prefix)
        patterns = [*(prefix + kind for kind in _SMALL), *weights]
        return snapshot_download(model, revision=revision, allow_patterns=patterns)

    root = folder_of(
        model, revision=revision, lacks=lambda root: lacks(root / inside), download=download
    )
    return root / inside


def _weights_of(model: str, revision: str | None, prefix: str) -> list[str]:
    """The weights that transformers would read, by name: safetensors, torch files, GGUF.

    FormatError where a repository has several GGUF files, which are kinds of one model.
    """
    from huggingface_hub import HfApi

    here = [
        name.removeprefix(prefix)
        for name in HfApi().list_repo_files(model, revision=revision)
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    ]
    for start, end in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if found := [prefix + n for n in here if n.startswith(start) and n.endswith(end)]:
            return found
    of_llama_cpp = [name for name in here if name.endswith(".gguf")]
    if len(of_llama_cpp) > 1:
        raise FormatError(
            f"the repository {model!r} has {len(of_llama_cpp)} GGUF files "
            f"({', '.join(sorted(of_llama_cpp)[:_SHOWN])}, ...); choose one with file="
        )
    return [prefix + name for name in of_llama_cpp] or [prefix + "*.safetensors"]


def _lacks_config(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return ""
    if (folder / "model_index.json").is_file():
        return (
            f"{str(folder)!r} is a pipeline (model_index.json): load_pipeline, or subfolder= for "
            "one of its text encoders"
        )
    if (folder / "adapter_config.json").is_file():
        return (
            f"{str(folder)!r} is an adapter (adapter_config.json). Load its base model with "
            f"loras=[({str(folder)!r}, 1.0)]"
        )
    return f"there is no config.json in {str(folder)!r}"


def _lacks_file(folder: Path, file: str) -> str:
    if not (folder / file).is_file():
        return f"there is no {file!r} in {str(folder)!r}"
    return "" if file.endswith(".gguf") else _lacks_config(folder)


def _lacks_model(folder: Path) -> str:
    weights = weights_file(folder)
    only_gguf = weights == folder and any(folder.glob("*.gguf"))
    return ("" if only_gguf else _lacks_config(folder)) or lacking(folder)


def _checked_class(cls: Any) -> Any:
    if isinstance(cls, str):
        import transformers

        named = getattr(transformers, cls, None)
        if named is None:
            raise SpecError(f"cls={cls!r}: transformers has no class of this name")
        return named
    if not (hasattr(cls, "from_config") or hasattr(cls, "_from_config")):
        raise SpecError(
            f"cls={cls!r:.80}: expected a model class of transformers, such as "
            "transformers.AutoModelForCausalLM"
        )
    return cls


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype that a model can compute in. SpecError."""
    found = dtype_of(dtype, "dtype", "'auto' or a floating dtype, such as 'bfloat16'")
    if not found.is_floating_point or found.itemsize < 2:
        raise SpecError(
            f"dtype={dtype}: a model computes in float32, float16 or bfloat16; files with narrower "
            "weights are read as they are"
        )
    return found


def dtype_for(dtype: torch.dtype | str, config: Any, weights: Path) -> torch.dtype:
    """The dtype that was asked for; "auto" is that of the configuration, else that of the file, as
    in transformers. SpecError.
    """
    if dtype != "auto":
        return checked_dtype(dtype)
    said = getattr(config, "dtype", None)
    if isinstance(said, str):
        said = getattr(torch, said.removeprefix("torch."), None)
    if isinstance(said, torch.dtype) and said.is_floating_point and said.itemsize > 1:
        return said
    return floating_dtype(open_checkpoint(weights))


def empty_pretrained(
    cls: Any, config: Any, dtype: torch.dtype, weights: Path, **remote: Any
) -> tuple[nn.Module, Checkpoint]:
    """A model without weights, but for those that no checkpoint of its class has; and the
    checkpoint, under its names. FormatError.
    """
    with naming(weights.parent, "transformers"):
        module = empty_transformers_model(cls, config, dtype, **remote)
    checkpoint = open_for(module, weights)
    stored = checkpoint.tensors
    _untie_what_differs(module, stored)
    names = _names_of(module)
    have = match_names(stored, [name for tied in names for name in tied])
    if not have:  # another model: load says so
        return module, checkpoint
    missing = [tied[0] for tied in names if have.keys().isdisjoint(tied)]
    if new := give_initial_values(module, missing):
        warn_at_caller(
            f"{str(weights)!r} has no values for {', '.join(map(repr, new[:_SHOWN]))}"
            f"{f' and {len(new) - _SHOWN} more' if len(new) > _SHOWN else ''}: they are new, and "
            f"random. Train them, or give the class that the file was made with (cls=)",
            UserWarning,
        )
    return module, checkpoint


def _names_of(module: nn.Module) -> list[list[str]]:
    """The names of every parameter: several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _untie_what_differs(module: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """As transformers does where a file has both ends of a tie, and they are not the same."""
    for names in _names_of(module):
        have = match_names(stored, names) if len(names) > 1 else {}
        first = next(iter(have), "")
        for name in have:
            if name != first and not same_bytes(stored[have[first]], stored[have[name]]):
                path, _, key = name.rpartition(".")
                owner = module.get_submodule(path)
                owner._parameters[key] = nn.Parameter(torch.empty_like(module.get_parameter(name)))


def _read_generation_config(module: Any, found: Found) -> None:
    from transformers import GenerationConfig

    can = getattr(module, "can_generate", None)
    if can is not None and can() and (found.folder / "generation_config.json").is_file():
        check_json(found.folder, "generation_config.json")
        with naming(found.folder, "transformers"):
            module.generation_config = GenerationConfig.from_pretrained(found.folder)


def _distributed(module: nn.Module, wish: Request, progress: Progress) -> nn.Module:
    """A module that its library has loaded, as `load` would have left it."""
    api.distribute(
        module, wish.spec, virtual_vram=wish.virtual_vram, donor=wish.donor, progress=progress,
        **wish.placing,
    )  # fmt: skip
    if wish.loras:
        set_loras(
            module, wish.loras, strict_loras=wish.strict_loras, lora_mode=wish.lora_mode,
            patched_dtype=wish.patched_dtype, progress=progress,
        )  # fmt: skip
    return module
