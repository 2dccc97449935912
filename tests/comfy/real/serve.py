# SPDX-License-Identifier: Apache-2.0
"""Runs ComfyUI's main.py in this process, with stand-ins for packages that tests do not need.

usage: serve.py COMFYUI_DIR [arguments of main.py]
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _define_torchvision_operators() -> torch.library.Library | None:
    """torchvision without compiled operators imports once their schemas are there."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return library
    except ImportError:
        pass
    return None


def _stand_in(name: str, parts: tuple[str, ...] = ()) -> None:
    if importlib.util.find_spec(name) is not None:
        return
    package = types.ModuleType(name)
    package.__spec__, package.__path__ = ModuleSpec(name, None), []
    sys.modules[name] = package
    for part in parts:
        module = types.ModuleType(f"{name}.{part}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
        setattr(package, part, module)


def prepare(comfyui: Path) -> torch.library.Library | None:
    """Makes ComfyUI's modules importable here."""
    library = _define_torchvision_operators()
    _stand_in("torchaudio", ("functional", "transforms"))
    sys.path.insert(0, str(comfyui))
    return library


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    kept = prepare(folder)
    os.chdir(folder)
    sys.argv = [str(folder / "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
