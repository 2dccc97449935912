# SPDX-License-Identifier: Apache-2.0
"""ComfyUI custom node: copy or link this folder into ComfyUI's `custom_nodes`."""

import sys

try:
    from distorch.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY
except ModuleNotFoundError as error:
    if error.name != "distorch":
        raise
    raise ImportError(
        "the nodes of distorch need distorch itself, in ComfyUI's own Python. In distorch's "
        f"folder: {sys.executable} -m pip install . (or `distorch` for `.`, once it is on PyPI)"
    ) from None

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
