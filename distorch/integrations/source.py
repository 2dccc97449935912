"""Where a pipeline comes from: its folder, its parts, and which file has the weights of each."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distorch.errors import FormatError, SpecError
from distorch.integrations.empty_models import of_diffusers
from distorch.integrations.hub import folder_of
from distorch.integrations.pretrained import Found, empty_pretrained
from distorch.integrations.weights import lacking, opened, weights_file

_INDEX = "model_index.json"
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


@dataclass(frozen=True)
class Part:
    """A model in a pipeline. `weights`: files that may have its weights, the first that fits is
    taken.
    """

    name: str
    cls: Any
    folder: Path
    weights: tuple[Path, ...]
    variant: str | None
    shares_a_file: bool  # the first one, with the other parts of the pipeline

    @property
    def is_of_transformers(self) -> bool:
        """Else it is of diffusers."""
        return not hasattr(self.cls, "load_config")

    def empty(self, dtype: torch.dtype, weights: Path) -> nn.Module:
        """The model without weights, to be filled from a file. FormatError."""
        if not self.is_of_transformers:
            return of_diffusers(self.cls, self.folder, dtype)
        config = Found(self.folder, weights, weights.suffix == ".gguf").config(self.cls)
        return empty_pretrained(self.cls, config, dtype, weights)

    def whole(self, dtype: torch.dtype) -> nn.Module:
        """The model as its library loads it, in RAM. FormatError."""
        name = "dtype" if self.is_of_transformers else _dtype_argument()
        given: dict[str, Any] = {name: dtype}
        if self.variant and weights_file(self.folder, self.variant) != weights_file(self.folder):
            given["variant"] = self.variant
        if lacking(self.folder):  # its weights are in a file with those of others
            return self._from_single_file(dtype)
        return self.cls.from_pretrained(self.folder, **given).eval()  # type: ignore[no-any-return]

    def _from_single_file(self, dtype: torch.dtype) -> nn.Module:
        """Text encoders in original checkpoints, which diffusers converts by computing."""
        from diffusers.loaders import single_file_utils

        make: Any = single_file_utils.create_diffusers_clip_model_from_ldm
        tensors = {name: t.read() for name, t in opened(self.weights[0]).tensors.items()
                   if name.startswith(_TEXT_PREFIXES)}  # fmt: skip
        try:
            made = make(
                self.cls, checkpoint=tensors, config=str(self.folder.parent),
                subfolder=self.folder.name, torch_dtype=dtype, local_files_only=True,
            )  # fmt: skip
        except (ValueError, OSError, KeyError) as error:
            raise FormatError(
                f"{str(self.weights[0])!r} has no {self.name} that diffusers can read ({error}), "
                f"and neither has {str(self.folder)!r}; give files={{{self.name!r}: ...}}"
            ) from error
        return made.eval()  # type: ignore[no-any-return]


_TEXT_PREFIXES = ("cond_stage_model.", "conditioner.", "text_encoders.")


@dataclass(frozen=True)
class Source:
    """A pipeline's folder, and the file that has the weights of several parts, if there is one."""

    folder: Path
    index: Mapping[str, Any]
    single: Path | None
    variant: str | None
    cls: Any
    components: Mapping[str, Any]
    files: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: str,
        *,
        config: str | None,
        variant: str | None,
        revision: str | None,
        pipeline: Any,
        components: Mapping[str, Any],
        files: Mapping[str, str],
    ) -> Source:
        """Raises SpecError, FormatError."""
        here, single = Path(model).expanduser(), None
        if here.is_file() and here.suffix in _SINGLE_FILES:
            single, model = here, config or _guessed_config(here)
        elif config is not None:
            raise SpecError(
                f"config={config!r} goes with one file that has the whole pipeline, and {model!r} "
                "is none"
            )
        replaced = {**files, **components}

        def download() -> str:
            if single is not None:
                from huggingface_hub import snapshot_download

                return snapshot_download(model, revision=revision, allow_patterns=_CONFIGS)
            from diffusers import DiffusionPipeline

            none = dict.fromkeys(replaced, None)
            fetch: Any = DiffusionPipeline.download
            return str(fetch(model, revision=revision, variant=variant, **none))

        try:
            folder = folder_of(
                model, revision=revision, download=download,
                lacks=lambda f: _lacks(f, variant, replaced, single is None),
            )  # fmt: skip
        except FormatError as error:
            if single is None:
                raise
            raise FormatError(
                f"{str(single)!r} is taken for a whole pipeline, whose configuration is in "
                f"{model!r} ({error}). Give its folder or id as config=; a transformer alone goes "
                "into files=, a LoRA into loras="
            ) from error
        index = json.loads((folder / _INDEX).read_text())
        known = [name for name, value in index.items() if _is_part(name, value)]
        for name in replaced:
            if name not in index and name in files:
                raise SpecError(
                    f"files={{{name!r}: ...}}: the pipeline has no such part; it has "
                    f"{', '.join(known)}"
                )
        pipeline = _pipeline_class(index.get("_class_name")) if pipeline is None else pipeline
        return cls(folder, index, single, variant, pipeline, components, files)

    def parts(self) -> dict[str, Part]:
        """The models that are to be streamed. FormatError."""
        found, found_variant = {}, False
        for name, value in self.index.items():
            if not _is_part(name, value) or name in self.components:
                continue
            cls = _class_of(*value)
            if cls is None or not (self.folder / name).is_dir():
                continue
            folder = self.folder / name
            weights = [weights_file(folder, self.variant)]
            found_variant |= weights != [weights_file(folder)]
            if self.single is not None:
                weights = [self.single, *(weights if not lacking(folder, self.variant) else ())]
            if name in self.files:
                weights = [_existing(name, self.files[name])]
            shares = weights[0] == self.single
            found[name] = Part(name, cls, folder, tuple(weights), self.variant, shares)
        if self.variant is not None and not found_variant:
            raise FormatError(
                f"variant={self.variant!r}: no part in {str(self.folder)!r} has weights of this "
                f"variant, such as 'model.{self.variant}.safetensors'"
            )
        if not found:
            raise FormatError(f"{str(self.folder / _INDEX)!r} names no model that can be streamed")
        return found

    def pipeline(self, modules: Mapping[str, nn.Module], dtypes: Any) -> Any:
        """The pipeline around these modules; diffusers loads its tokenizers and schedulers."""
        given = {_dtype_argument(): dtypes, **self.components, **modules}
        return self.cls.from_pretrained(self.folder, **given)


_CONFIGS = ["**/*.json", "*.json", "*.txt", "**/*.txt", "**/*.model"]


def _dtype_argument() -> str:
    """What this version of diffusers calls it."""
    from diffusers.pipelines import pipeline_utils

    return "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"


def _lacks(
    folder: Path, variant: str | None, replaced: Mapping[str, Any], with_weights: bool
) -> str:
    try:
        index = json.loads((folder / _INDEX).read_text())
    except OSError:
        return f"there is no {_INDEX} in {str(folder)!r}"
    except ValueError as error:
        return f"{str(folder / _INDEX)!r} is not JSON: {error}"
    for name, value in index.items():
        if not _is_part(name, value) or name in replaced:
            continue
        if not (folder / name).is_dir():
            return f"{name!r}, which {_INDEX} lists, is not there"
        has_model = (folder / name / "config.json").is_file()
        if with_weights and has_model and (why := lacking(folder / name, variant)):
            return f"{name}: {why}"
    return ""


def _is_part(name: str, value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return not name.startswith("_") and is_pair and all(isinstance(v, str) for v in value)


def _class_of(library: str, name: str) -> Any:
    """The class of a part if it is a model that can be made empty, else None."""
    import diffusers
    from diffusers import pipelines

    if hasattr(pipelines, library):
        found = getattr(getattr(pipelines, library), name, None)
    elif library in ("diffusers", "transformers"):
        found = getattr(importlib.import_module(library), name, None)
    else:
        return None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return None
    of_diffusers_ = issubclass(found, diffusers.ModelMixin)
    return found if of_diffusers_ or hasattr(found, "_from_config") else None


def _pipeline_class(name: str | None) -> Any:
    import diffusers

    return getattr(diffusers, name or "", None) or diffusers.DiffusionPipeline


def _existing(part: str, file: str) -> Path:
    path = Path(file).expanduser()
    if not path.exists():
        raise FormatError(f"files={{{part!r}: {str(file)!r}}}: no such file")
    return path


def _guessed_config(file: Path) -> str:
    """The id of the hub whose configuration diffusers takes for such a file. FormatError."""
    from diffusers.loaders import single_file_utils

    tensors = {
        name: torch.empty(t.shape, dtype=t.dtype, device="meta")
        for name, t in opened(file).tensors.items()
    }
    try:
        guess: Any = single_file_utils.fetch_diffusers_config
        found = guess(tensors)["pretrained_model_name_or_path"]
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise FormatError(
            f"{str(file)!r}: diffusers does not know what pipeline this is ({error}); give config=,"
            " the folder or id of a pipeline with its configuration"
        ) from error
    return str(found)
