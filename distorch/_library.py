# SPDX-License-Identifier: Apache-2.0
"""Whether the compiled library is there, and fits this Python and this torch.

A library that was built for another torch may load, and crash later. So the torch it was built for
is read from the file before it is loaded.
"""

from __future__ import annotations

import mmap
import re
import sysconfig
from pathlib import Path

# As csrc/bindings/module.cpp and csrc/cuda/library.cu have it.
_BUILT_FOR = re.compile(rb"distorch was built for torch (\d+\.\d+[\w.]*)")
_KERNELS = re.compile(rb"distorch kernels: (CUDA [\d.]+), architectures ([\d,]+)")
AGAIN = (
    "install distorch again, in its folder: pip install --force-reinstall --no-deps . (If it came "
    "from an index: pip install --force-reinstall --no-deps --no-cache-dir distorch)"
)


def problem(folder: Path, torch_version: str) -> str:
    """What keeps the library in `folder` from being loaded beside that torch ("": nothing does)."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    library = folder / f"_C{suffix}"
    if not library.is_file() or library.stat().st_size == 0:  # the disk was full
        return f"distorch's compiled library is not there: {_why_missing(folder, suffix)}"
    built_for = _built_for(library)
    if built_for is not None and _minor(built_for) != _minor(torch_version):
        return (
            f"distorch was built for torch {built_for}, and this is torch {torch_version}. It "
            f"fits one minor version of torch: {AGAIN}"
        )
    return ""


def kernels_of(library: Path) -> tuple[str, list[int]] | None:
    """The CUDA release and the compute capabilities (such as 89) that kernels were built for.

    None: there are none, or an older distorch has built them.
    """
    if not library.is_file() or library.stat().st_size == 0:
        return None
    found = _search(library, _KERNELS)
    if found is None:
        return None
    release, architectures = found
    return release, [int(arch) // 10 for arch in architectures.split(",") if arch]


def _why_missing(folder: Path, suffix: str) -> str:
    if others := sorted({path.name for path in folder.glob("_C.*.so")} - {f"_C{suffix}"}):
        return f"it was built for another Python ({others[0]}, expected _C{suffix}); {AGAIN}"
    if (folder.parent / "setup.py").is_file():
        return (
            f"{folder.parent} has the sources of distorch. A Python that is started there takes "
            "them, not the installed distorch. Start it in another folder, or build in place: pip "
            "install --editable ."
        )
    return AGAIN


def _built_for(library: Path) -> str | None:
    found = _search(library, _BUILT_FOR)
    return found[0] if found is not None else None


def _search(library: Path, pattern: re.Pattern[bytes]) -> list[str] | None:
    """The groups of a pattern where it first stands in a library."""
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        found = pattern.search(content)
        return [group.decode() for group in found.groups()] if found is not None else None


def _minor(version: str) -> list[str]:
    return version.split("+", maxsplit=1)[0].split(".")[:2]
