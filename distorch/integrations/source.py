# SPDX-License-Identifier: Apache-2.0
"""Where a pipeline comes from: its folder, its parts, and which file has the weights of each."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distorch._small_files import read_json
from distorch.errors import FormatError, SpecError
from distorch.formats.checkpoint import Checkpoint, open_checkpoint
from distorch.formats.naming import ConversionError
from distorch.integrations.empty_models import empty_diffusers_model
from distorch.integrations.hub import check_no_other_file, folder_of
from distorch.integrations.pretrained import Found, empty_pretrained
from distorch.integrations.trust import check_json, check_no_code, naming
from distorch.integrations.weights import lacking, weights_file
from distorch.loading.prepare import open_for

_INDEX = "model_index.json"
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_CONFIGS = ["**/*.json", "*.json", "*.txt", "**/*.txt", "**/*.model"]
# What stands before the names of a part in a file of a whole pipeline.
_TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
_IN_WHOLE_FILES = {
    "unet": ("model.diffusion_model.",), "transformer": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."), "text_encoder": _TEXT, "text_encoder_2": _TEXT,
    "text_encoder_3": _TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A model in a pipeline: its class, the folder with its configuration, and the file with its
    weights.
    """

    name: str
    cls: Any
    folder: Path
    weights: Path
    variant: str | None
    in_whole_file: bool = False  # with the weights of the other parts

    @property
    def _is_of_transformers(self) -> bool:
        return not hasattr(self.cls, "load_config")

    def library_can_load(self, error: FormatError) -> bool:
        """Whether `whole` gives these weights, which could not be streamed because of an error."""
        if self.in_whole_file:
            return self._is_of_transformers
        own = self.weights == weights_file(self.folder, self.variant)
        return own and isinstance(error, ConversionError)

    def empty(self, dtype: torch.dtype) -> tuple[nn.Module, Checkpoint]:
        """The model without weights, and its checkpoint under its names. FormatError."""
        if not self._is_of_transformers:
            check_json(self.folder, "config.json")
            with naming(self.folder, "diffusers"):
                module = empty_diffusers_model(self.cls, self.folder, dtype)
            return module, open_for(module, self.weights)
        config = Found(self.folder, self.weights, self.weights.suffix == ".gguf").config(self.cls)
        return empty_pretrained(self.cls, config, dtype, self.weights)

    def whole(self, dtype: torch.dtype) -> nn.Module:
        """The model as its library loads it, in RAM. FormatError."""
        if self.in_whole_file:
            return self._text_encoder_of_single_file(dtype)
        given: dict[str, Any] = {"dtype" if self._is_of_transformers else _dtype_argument(): dtype}
        if self.weights != weights_file(self.folder):
            given["variant"] = self.variant
        return self.cls.from_pretrained(self.folder, **given).eval()  # type: ignore[no-any-return]

    def _text_encoder_of_single_file(self, dtype: torch.dtype) -> nn.Module:
        """Some are stored in a form that diffusers converts by computing."""
        from diffusers.loaders import single_file_utils

        make: Any = single_file_utils.create_diffusers_clip_model_from_ldm
        stored = open_checkpoint(self.weights).tensors
        tensors = {name: t.read() for name, t in stored.items() if name.startswith(_TEXT)}
        try:
            made = make(
                self.cls, checkpoint=tensors, config=str(self.folder.parent),
                subfolder=self.folder.name, torch_dtype=dtype, local_files_only=True,
            )  # fmt: skip
        except (ValueError, OSError, KeyError) as error:
            raise FormatError(
                f"{str(self.weights)!r} has no {self.name} that diffusers can read ({error}); "
                f"give files={{{self.name!r}: ...}}"
            ) from error
        return made.eval()  # type: ignore[no-any-return]


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
        check_no_other_file(here, _SINGLE_FILES, "a folder, or one file with a whole pipeline")
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
                f"{str(single)!r} is taken for a whole pipeline, and its configuration was not "
                f"found in {model!r} ({error}). Give the folder or id that has it as config=. If "
                "the file is a transformer alone, give it as files=; a LoRA, as loras="
            ) from error
        index = _index_of(folder)
        check_no_code(folder, index, components)
        if not hasattr(pipeline, "from_pretrained"):
            pipeline = _pipeline_class(index.get("_class_name") if pipeline is None else pipeline)
        named = [name for name, value in index.items() if _is_part(name, value)]
        _check_names("files", files, named)
        _check_names("components", components, [*named, *_arguments(pipeline)])
        return cls(folder, index, single, variant, pipeline, components, files)

    def parts(self) -> dict[str, Part]:
        """The models that are to be streamed. SpecError, FormatError."""
        found, has_variant = {}, False
        held = frozenset(open_checkpoint(self.single).tensors if self.single else ())
        for name, value in self.index.items():
            if not _is_part(name, value) or name in self.components:
                continue
            folder = self.folder / name
            cls = _class_of(*value)
            if cls is None or not folder.is_dir():
                continue
            weights = weights_file(folder, self.variant)
            has_variant |= weights != weights_file(folder)
            if name in self.files:
                weights = _existing(name, self.files[name])
            elif self.single is not None and _has_part(held, name):
                found[name] = Part(name, cls, folder, self.single, None, in_whole_file=True)
                continue
            elif self.single is not None and (why := lacking(folder, self.variant)):
                raise FormatError(
                    f"{str(self.single)!r} has no weights of {name!r}, and {why}. Give "
                    f"files={{{name!r}: ...}}, or, if the pipeline does without it, "
                    f"components={{{name!r}: None}}"
                )
            found[name] = Part(name, cls, folder, weights, self.variant)
        if self.variant is not None and not has_variant:
            raise FormatError(
                f"variant={self.variant!r}: no part in {str(self.folder)!r} has weights of this "
                f"variant, such as 'model.{self.variant}.safetensors'"
            )
        return found

    def pipeline(self, modules: Mapping[str, nn.Module], dtypes: Any) -> Any:
        """The pipeline around these modules; diffusers loads its tokenizers and schedulers.

        FormatError.
        """
        given = {_dtype_argument(): dtypes, **self.components, **modules}
        try:
            with _without_bars():  # its parts are there already
                return self.cls.from_pretrained(self.folder, **given)
        except Exception as error:  # on values that make no sense it raises anything
            raise FormatError(
                f"diffusers cannot make a {self.cls.__name__} of {str(self.folder)!r}: {error}"
            ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """diffusers shows no bars: ours say how far the work is."""
    from diffusers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _has_part(held: frozenset[str], name: str) -> bool:
    """Whether a file of a whole pipeline has something of a part."""
    prefixes = {prefix for kinds in _IN_WHOLE_FILES.values() for prefix in kinds}
    if not any(key.startswith(tuple(prefixes)) for key in held):
        return name in ("unet", "transformer")  # a file of that alone
    own = _IN_WHOLE_FILES.get(name, ())
    return any(key.startswith(own) for key in held) if own else False


def _dtype_argument() -> str:
    """What this version of diffusers calls it."""
    from diffusers.pipelines import pipeline_utils

    return "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"


def _index_of(folder: Path) -> dict[str, Any]:
    """What model_index.json says. FormatError."""
    path = folder / _INDEX
    try:
        index = read_json(path)
    except OSError as error:
        one = (folder / "config.json").is_file()
        hint = "; of one model (config.json): load_pretrained, or distorch.load" if one else ""
        raise FormatError(f"{str(folder)!r} is no pipeline: it has no {_INDEX}{hint}") from error
    except ValueError as error:
        raise FormatError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(index, dict):
        raise FormatError(f"{str(path)!r}: expected a table of parts, found {index!r:.80}")
    return index


def _lacks(
    folder: Path, variant: str | None, replaced: Mapping[str, Any], with_weights: bool
) -> str:
    """Why a folder is no whole pipeline, in words; "" if it is one."""
    try:
        index = _index_of(folder)
    except FormatError as error:
        return str(error)
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
    """Whether an entry of the index is a part that is there; its name is that of a folder."""
    is_pair = isinstance(value, list) and len(value) == 2
    is_name = name.isidentifier() and not name.startswith("_")
    return is_name and is_pair and all(isinstance(v, str) for v in value)


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
    known = issubclass(found, diffusers.ModelMixin) or hasattr(found, "_from_config")
    return found if known else None


def _pipeline_class(name: Any) -> Any:
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        raise SpecError(
            f"the pipeline {name!r} (of {_INDEX}, or cls=) is none that this version of diffusers "
            "has; give cls=, a pipeline class"
        )
    return found


def _arguments(pipeline: Any) -> list[str]:
    return list(inspect.signature(pipeline.__init__).parameters)[1:]


def _check_names(option: str, given: Mapping[str, Any], known: list[str]) -> None:
    """SpecError on a name that the pipeline does not have."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise SpecError(f"{option}={{{name!r}: ...}}: the pipeline has no such part; {hint}")


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
        for name, t in open_checkpoint(file).tensors.items()
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
