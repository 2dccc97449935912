# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines in folders."""

import shutil

import pytest

from tests import tiny_models as tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines that are made once: name -> (folder, arguments of a small picture)."""
    made = {}

    def get(make):
        if make.__name__ not in made:
            made[make.__name__] = tiny.save_pipeline(make, tmp_path_factory.mktemp(make.__name__))
        return made[make.__name__]

    return get


@pytest.fixture
def folder(folders, tmp_path):
    """A Stable Diffusion pipeline of its own."""
    shutil.copytree(folders(tiny.stable_diffusion)[0], tmp_path / "sd")
    return tmp_path / "sd"
