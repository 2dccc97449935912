# SPDX-License-Identifier: Apache-2.0
"""A ComfyUI to test against: COMFYUI_DIR names it; without it these tests are skipped, and say so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.comfy.real.client import HERE, Host, made_base

COMFYUI = os.environ.get("COMFYUI_DIR")


def _knows_tiny_flux():
    detection = Path(COMFYUI, "comfy", "model_detection.py").read_text()
    return 'dit_config["hidden_size"] // sum(dit_config["axes_dim"])' in detection


def pytest_collection_modifyitems(items):
    ours = [item for item in items if HERE in Path(item.fspath).parents]
    for item in ours:
        if not COMFYUI:
            item.add_marker(pytest.mark.skip(reason="no ComfyUI: make test-comfy COMFYUI_DIR=..."))
        elif item.get_closest_marker("tiny_flux") and not _knows_tiny_flux():
            reason = "this ComfyUI knows Flux in its published size only"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Models and custom nodes. COMFYUI_TEST_BASE keeps the checkpoints from run to run."""
    kept = os.environ.get("COMFYUI_TEST_BASE")
    return made_base(Path(kept) if kept else tmp_path_factory.mktemp("comfy"), Path(COMFYUI))


@pytest.fixture(scope="module")
def host(base):
    with Host(Path(COMFYUI), base) as started:
        yield started


WAYS = ("static", "dynamic", "dynamic only")


@pytest.fixture(scope="module", params=WAYS)
def simulated(base, request):
    """ComfyUI on two simulated devices of 256 MiB each, in each of the ways in which it may manage
    the memory of its own models: static, by dynamic VRAM, and so that it has nothing else.
    """
    with _simulated(base, request.param) as started:
        yield started


@pytest.fixture(scope="module", params=WAYS[1:])
def dynamic(base, request):
    """The same with dynamic VRAM, on devices of 96 MiB each, and with pinned memory."""
    with _simulated(base, request.param, memory=96 << 20, pinned=48 << 20) as started:
        yield started


@pytest.fixture(scope="module", params=WAYS[1:])
def large(base, request):
    """The same on devices of 1 GiB each, for checkpoints."""
    with _simulated(base, request.param, memory=1 << 30) as started:
        yield started


@pytest.fixture(scope="module")
def static_host(base):
    """One without dynamic VRAM, to compare with."""
    with _simulated(base, "static") as started:
        yield started


def _simulated(base, way, memory=256 << 20, pinned=0):
    if way != "static" and not _has_dynamic_vram():
        pytest.skip("this ComfyUI has no dynamic VRAM")
    environment = {"DISTORCH_SIM_MEMORY": str(memory), "DISTORCH_TEST_PINNED": str(pinned)}
    if way == "dynamic only":
        environment["DISTORCH_TEST_STATIC_PATH"] = "unknown"
    options = () if way == "static" else ("--enable-dynamic-vram",)
    host = Host(
        Path(COMFYUI), base, options=options, serve=HERE / "serve_sim.py", environment=environment
    )
    host.way = way
    return host


def _has_dynamic_vram():
    return "class ModelPatcherDynamic" in Path(COMFYUI, "comfy", "model_patcher.py").read_text()
