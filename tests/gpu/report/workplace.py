# SPDX-License-Identifier: Apache-2.0
"""Where the items run: the tree itself, or a copy of it with binaries that were built elsewhere.

A kit is a folder with `kit.json`, the compiled libraries under their paths in the tree, and wheels of
pure Python packages. It is for machines without a compiler or a package registry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
KIT = ROOT / "gpu-kit"
# What the items need of the tree.
_COPIED = (
    "benchmarks", "csrc", "distorch", "examples", "tests", "pyproject.toml", "setup.py", "MANIFEST.in",
    "README.md", "CHANGELOG.md", "LICENSE", "Makefile",
)  # fmt: skip
_LEFT = shutil.ignore_patterns("__pycache__", "*.so", ".pytest_cache", "*.egg-info")


@dataclasses.dataclass(frozen=True)
class Workplace:
    """`folder` is what items run in, `site` the kit's packages that this Python lacks; `notes` say
    what was chosen.
    """

    folder: Path
    site: Path | None
    notes: list[str]

    def environment(self) -> dict[str, str]:
        """The folder comes first: its distorch has the binaries, an installed one may not."""
        parts = [
            str(self.folder),
            str(self.site) if self.site else "",
            os.environ.get("PYTHONPATH"),
        ]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in parts if part)}

    def built(self) -> bool:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return (self.folder / "distorch" / f"_C{suffix}").exists()


def read_kit(kit: Path) -> dict[str, Any]:
    """A kit's description. OSError, ValueError."""
    if not (kit / "kit.json").exists():
        raise ValueError("expected kit.json, made by make gpu-kit")
    found = json.loads((kit / "kit.json").read_text())
    if not isinstance(found, dict) or "abi" not in found:
        raise ValueError(f"{kit / 'kit.json'}: expected an object with 'abi'")
    return found


def prepared(kit: Path | None, scratch: Path, root: Path = ROOT) -> Workplace:
    """The place to run in: with the kit if it fits this Python, else the tree if it is built."""
    notes = []
    if kit is not None:
        known = read_kit(kit)
        abi = sysconfig.get_config_var("SOABI")
        if known["abi"] == abi:
            return with_kit(kit, known, scratch, root)
        notes.append(f"the kit was not used: it is for {known['abi']}, this Python is {abi}")
    here = Workplace(root, None, [*notes, "items run in the tree itself"])
    if here.built():
        return here
    return Workplace(copied(root, scratch / "tree"), None, [*notes, "nothing is built in the tree"])


def with_kit(
    kit: Path, known: dict[str, Any], scratch: Path, root: Path = ROOT, *,
    lacks: Callable[[str], bool] | None = None,
) -> Workplace:  # fmt: skip
    """A copy of the tree under `scratch`, with a kit's libraries, and those of its packages beside
    it that this Python `lacks`: what the machine has itself goes with its other packages.
    """
    folder = copied(root, scratch / "tree")
    libraries = sorted((kit / "distorch").rglob("*.so"))
    for library in libraries:
        target = folder / library.relative_to(kit)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)
    wheels = sorted((kit / "wheels").glob("*.whl"))
    site = scratch / "site"
    site.mkdir()
    taken = []
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if any(map(lacks or _lacks, _modules(archive.namelist()))):
                    archive.extractall(site)
                    taken.append(wheel.name.partition("-")[0])
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{wheel.name}: {error}") from None
    there = f"{len(wheels) - len(taken)} are here already" if len(wheels) > len(taken) else ""
    notes = [
        f"the kit gave {len(libraries)} libraries and {len(taken)} of {len(wheels)} packages "
        f"({'; '.join(filter(None, [', '.join(taken), there]))})"
    ]
    torch = _version("torch")
    if torch and known.get("torch") and torch != known["torch"]:
        notes.append(f"the kit was built for torch {known['torch']}, this one is {torch}")
    here = _commit(root)
    if here and known.get("commit") and here != known["commit"]:
        notes.append(f"the kit was built from commit {known['commit'][:12]}, this is {here[:12]}")
    return Workplace(folder, site, notes)


def _commit(root: Path) -> str:
    """Of the checkout, if it is one."""
    try:
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _modules(names: Iterable[str]) -> set[str]:
    """The modules at the top of a wheel."""
    tops = {name.partition("/")[0] for name in names}
    return {top.removesuffix(".py") for top in tops if not top.endswith((".dist-info", ".data"))}


def _lacks(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def copied(root: Path, folder: Path) -> Path:
    """The tree without what was built in it."""
    folder.mkdir(parents=True)
    for name in _COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=_LEFT)
        elif source.exists():
            shutil.copy2(source, folder / name)
    return folder


def _version(package: str) -> str | None:
    """torch's own string says the CUDA it is for, which its package's may not."""
    with contextlib.suppress(metadata.PackageNotFoundError, OSError):
        found = metadata.distribution(package)
        text = Path(str(found.locate_file(f"{package}/version.py"))).read_text()
        for line in text.splitlines():
            if line.startswith("__version__ = "):
                return line.split("=", 1)[1].strip().strip("'\"")
    return None
