# SPDX-License-Identifier: Apache-2.0
"""What a stranger's folder may say: no code is run, and each error names the folder.

Newer versions of diffusers ask for `trust_remote_code`. Older ones run what they find, so it is
looked for here, before diffusers sees the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distorch._small_files import kind_of, read_table
from distorch.errors import DistorchError, FormatError, SpecError

_LIBRARIES = ("diffusers", "transformers", "onnxruntime.training")


@contextmanager
def naming(folder: Path, library: str) -> Iterator[None]:
    """Whatever a library raises on a configuration that makes no sense becomes a FormatError."""
    try:
        yield
    except DistorchError:
        raise
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        raise FormatError(
            f"{library} cannot make what the configuration in {str(folder)!r} says "
            f"({type(error).__name__}: {said:.300})"
        ) from error


def check_json(folder: Path, *names: str) -> None:
    """FormatError if one of these files is there and is no table in JSON, or is too large.

    SpecError if it names code of the hub: transformers would fetch it without being asked.
    """
    for path in (folder / name for name in names):
        if kind_of(path) == "":
            continue
        read = read_table(path)
        for table in (read, *(value for value in read.values() if isinstance(value, dict))):
            for key, value in table.items():
                if key.endswith("_implementation") and "/" in str(value):
                    raise SpecError(
                        f"{str(path)!r} names code of the hub ({key}={value!r:.80}), which is not "
                        "fetched because a file says so; take that out of the file"
                    )


def check_no_code(folder: Path, index: Mapping[str, Any], given: Collection[str]) -> None:
    """Raises SpecError or FormatError if diffusers might run code that the folder brings or names.

    Args:
        folder: Of the pipeline.
        index: What its model_index.json says.
        given: Parts that the user gives; nothing is made of what the index says of them.
    """
    _check_class(folder, index.get("_class_name"))
    for name, value in index.items():
        is_part = isinstance(value, list) and value and isinstance(value[0], str)
        if is_part and not name.startswith("_") and name not in given:
            _check_part(folder, name, value[0])


def _check_class(folder: Path, named: Any) -> None:
    code = [f"{named[0]}.py"] if isinstance(named, list) and named else []
    for file in [*code, "None.py"]:  # the name that older versions make of "no custom pipeline"
        if (folder / file).is_file():
            raise SpecError(
                f"the pipeline in {str(folder)!r} comes with code of its own ({file}), which is "
                "not run here; make it yourself with diffusers, then use distribute_pipeline"
            )


def _check_part(folder: Path, name: str, library: str) -> None:
    from diffusers import pipelines

    if not name.isidentifier():
        raise FormatError(f"{str(folder)!r}: its index has a part {name!r}, which is no name")
    if (folder / name / f"{library}.py").is_file():
        raise SpecError(
            f"{name!r} comes with code of its own ({library}.py), which is not run here; "
            f"make it yourself, and give components={{{name!r}: ...}}"
        )
    if library not in (*_LIBRARIES, *sys.modules) and not hasattr(pipelines, library):
        raise SpecError(
            f"{name!r} is of the library {library!r}, which is not imported because a file names "
            f"it; import it yourself before, or give components={{{name!r}: ...}}"
        )
