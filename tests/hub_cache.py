# SPDX-License-Identifier: Apache-2.0
"""Repositories in a local cache of the hub."""

import shutil


def put(cache, name, folder, commit="0" * 40, revision="main"):
    """A repository in a cache, as huggingface_hub lays it out: links to blobs without suffixes."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for path in folder.rglob("*"):
        if path.is_file():
            blob = repository / "blobs" / f"{commit[:4]}{abs(hash(path)):x}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return snapshot
