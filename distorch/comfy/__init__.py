# SPDX-License-Identifier: Apache-2.0
"""ComfyUI nodes: models whose weights live on donors, in saved workflows as they are.

ComfyUI finds `NODE_CLASS_MAPPINGS` and `NODE_DISPLAY_NAME_MAPPINGS` here, through the folder
`comfyui-distorch` in its `custom_nodes`. Importing this package needs ComfyUI.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distorch.comfy import advanced, gguf_nodes, loaders, own_nodes, packs
from distorch.comfy.inputs import checking

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = str(Path(__file__).with_name("web"))


def _register() -> None:
    own = (
        *loaders.core_nodes(),
        *gguf_nodes.nodes(),
        *advanced.NODES.items(),
        *own_nodes.NODES.items(),
    )
    # Nodes of other packs check their inputs as they like.
    for name, node in (*((name, checking(node)) for name, node in own), *packs.nodes()):
        NODE_CLASS_MAPPINGS[name], NODE_DISPLAY_NAME_MAPPINGS[name] = node, node.TITLE


_register()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
