# SPDX-License-Identifier: Apache-2.0
"""Folders of models and packs; the tests fill them in."""

from pathlib import Path

folder_names_and_paths = {"diffusion_models": ([], set()), "custom_nodes": ([], set())}


def get_folder_paths(kind):
    return folder_names_and_paths[kind][0]


def get_filename_list(kind):
    return []


def recursive_search(folder, excluded_dir_names=()):
    return [str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()], {}
