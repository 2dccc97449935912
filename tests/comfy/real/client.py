# SPDX-License-Identifier: Apache-2.0
"""A headless ComfyUI in a process of its own, asked over its HTTP API."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
Graph = dict[str, dict[str, Any]]


class GraphError(Exception):
    """The host refused a graph, or a node raised; `detail` is what it said."""

    def __init__(self, detail: Any) -> None:
        super().__init__(json.dumps(detail)[:4000])
        self.detail = detail


class Host:
    """ComfyUI from `folder`, with models and custom nodes in `base`. `page`: with its web page."""

    def __init__(
        self, folder: Path, base: Path, *, options: tuple[str, ...] = (),
        serve: Path | None = None, environment: Mapping[str, str] | None = None,
        page: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.base = folder, base
        self.port = _free_port()
        self.log = base / f"log-{self.port}.txt"
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, str(serve or HERE / "serve.py"), str(folder), "--cpu",
            "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
            "--disable-auto-launch", *options,
        ]  # fmt: skip
        if not page:
            front = base / "front"
            front.mkdir(exist_ok=True)
            (front / "index.html").touch()
            command += ["--front-end-root", str(front)]
        known = (folder / "comfy" / "cli_args.py").read_text()
        if "--disable-api-nodes" in known:
            command.append("--disable-api-nodes")
        if "--database-url" in known:
            command += ["--database-url", "sqlite:///:memory:"]
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=base,
                env={
                    **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1",
                    **(environment or {}),
                },
            )  # fmt: skip

    def __enter__(self) -> Host:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str) -> Any:
        """A GET request, JSON."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        """A POST request, JSON both ways."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def run(self, graph: Graph, timeout: float = 300) -> dict[str, Any]:
        """Runs a graph; node id -> what it showed. GraphError."""
        try:
            number = self.post("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise GraphError(json.loads(error.read())) from error
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.get(f"/history/{number}")
            if number in found:
                status = found[number]["status"]
                if status["status_str"] != "success":
                    raise GraphError(status["messages"])
                return found[number]["outputs"]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)
        raise TimeoutError(f"no answer in {timeout} s:\n{self.log.read_text()[-2000:]}")

    def free(self, *, cache: bool) -> None:
        """What the button "free memory" does; asked twice, since the host may miss a request."""
        for _ in range(2):
            self.post("/free", {"unload_models": True, "free_memory": cache})
            time.sleep(1.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(description: str | None) -> argparse.ArgumentParser:
    """What the programs of this folder are given: a ComfyUI, and where checkpoints are kept."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--base", type=Path, help="a folder for checkpoints, kept (4 GB)")
    return parser


@contextmanager
def base_of(given: argparse.Namespace) -> Iterator[Path]:
    """The folder with checkpoints that `command` was given, or one that goes away at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        yield made_base(given.base or Path(scratch), given.comfyui)


def link_pack(base: Path, pack: Path) -> None:
    """Makes a node pack one of this host's."""
    link = base / "custom_nodes" / pack.resolve().name
    if not link.exists():
        link.symlink_to(pack.resolve())


def made_base(folder: Path, comfyui: Path) -> Path:
    """The folder, with checkpoints that this ComfyUI takes, and our custom nodes."""
    for script, *arguments in (
        ("checkpoints.py", str(comfyui)), ("quantise.py",), ("kitchen.py",), ("others.py", str(comfyui)),
    ):  # fmt: skip
        done = folder / "models" / "loras" / f"{script}.done"
        if not done.exists():
            subprocess.run(
                [sys.executable, str(HERE / script), *arguments, str(folder / "models")],
                check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )  # fmt: skip
            done.touch()
    nodes = folder / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    for name, target in (
        ("comfyui-distorch", REPOSITORY / "comfyui-distorch"),
        ("test_nodes", HERE / "test_nodes"),
    ):
        if not (nodes / name).exists():
            (nodes / name).symlink_to(target)
    return folder
