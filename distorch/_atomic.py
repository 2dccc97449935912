# SPDX-License-Identifier: Apache-2.0
"""Writes a file completely, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path


def write_atomically(target: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8). If that fails, an older file is unchanged.

    As an ordinary write does, it follows links and keeps the permissions of an older file. What is
    no ordinary file, such as /dev/null or a pipe, is written to as it is.
    """
    data = content.encode() if isinstance(content, str) else content
    real = Path(os.path.realpath(target))
    if real.exists() and not real.is_file():
        real.write_bytes(data)
        return
    temporary = real.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        if real.exists():
            shutil.copymode(real, temporary)
        temporary.replace(real)
    except OSError as error:  # it names the temporary file
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)
