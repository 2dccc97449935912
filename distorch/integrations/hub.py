# SPDX-License-Identifier: Apache-2.0
"""Where a model's files are: a folder, a file, or a repository of the Hugging Face hub.

Note [Ids of the hub]
A model that is complete in the local cache is used as it is. The hub is not asked for something
newer: so a program starts without a network, and with the same files as yesterday. An interrupted
download leaves a snapshot with some of its files; such a snapshot is not used.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from distorch.errors import FormatError, SpecError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Says what a folder lacks; "" if it is complete.
Lacks = Callable[[Path], str]


def check_model(model: object) -> str:
    """The text of a path or an id. SpecError."""
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise SpecError(
            f"model={model!r:.80}: expected a folder, a file, or an id of the hub such as "
            f"'Qwen/Qwen3-8B', got {type(model).__name__}"
        )
    return os.fspath(model)


def check_no_other_file(path: Path, known: Sequence[str], expected: str) -> None:
    """FormatError on an existing file of another kind, which must not be taken for an id."""
    if path.is_file() and path.suffix not in known:
        raise FormatError(f"{str(path)!r} is a file: expected {expected}")


def folder_of(
    model: str,
    *,
    revision: str | None,
    lacks: Lacks,
    download: Callable[[], str | os.PathLike[str]],
) -> Path:
    """The folder with a model's files. If it is not in the cache, `download` brings it there.

    FormatError when it is incomplete, cannot be downloaded, or is neither a folder nor an id.
    """
    here = Path(model).expanduser()
    if here.is_dir():
        if problem := lacks(here):
            raise FormatError(f"{model!r} is no model that can be loaded: {problem}")
        return here
    _check_is_id(model)
    cached = in_cache(model, revision)
    problem = lacks(cached) if cached is not None else "it is not in the cache"
    if cached is not None and not problem:
        return cached
    fetched = Path(_downloaded(model, problem, download))
    if problem := lacks(fetched):
        raise FormatError(f"the repository {model!r} is no model that can be loaded: {problem}")
    return fetched


def _check_is_id(model: str) -> None:
    if not _ID.fullmatch(model) or Path(model).suffix in (".safetensors", ".gguf"):
        raise FormatError(
            f"{model!r}: there is no such file or folder, and it is no id of the hub, such as "
            "'Qwen/Qwen3-8B'"
        )


def in_cache(model: str, revision: str | None) -> Path | None:
    """The snapshot of a repository in the local cache, complete or not; None if there is none."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FormatError(
            f"{model!r} is not a folder. Ids of the hub need: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not there, or no id: the error of a download says more
        return None


def _downloaded(
    model: str, problem: str, download: Callable[[], str | os.PathLike[str]]
) -> str | os.PathLike[str]:
    from huggingface_hub import constants

    cache = f"the cache is {constants.HF_HUB_CACHE!r} (HF_HOME, HF_HUB_CACHE)"
    if constants.HF_HUB_OFFLINE:
        raise FormatError(
            f"{model!r} is not available: {problem}, and HF_HUB_OFFLINE forbids a download; "
            f"{cache}. Give the folder that has it, or allow the download"
        )
    try:
        return download()
    except FormatError:
        raise
    except Exception as error:  # of the network, the hub, or a proxy: each library has its own
        raise FormatError(
            f"{model!r} is not available: {problem}, and the download failed "
            f"({type(error).__name__}: {_first_line(error)}); {cache}. Is the id right, is there a "
            "network, does the repository ask for a login (HF_TOKEN)? Or give a folder"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 300, placeholder=" ...") if lines else "no reason given"
