# SPDX-License-Identifier: Apache-2.0
"""Where a tool of the CUDA Toolkit is: its folder is often not on the PATH."""

from __future__ import annotations

import os
import shutil


def where(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))
