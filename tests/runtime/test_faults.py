# SPDX-License-Identifier: Apache-2.0
"""Faults in the middle: the named error, the module as before, nothing left behind."""

import contextlib
import copy
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distorch
from distorch import _donors
from distorch.runtime import placing, swapping
from distorch.runtime.module_agent import ModuleAgent
from tests.processes import donor_files


def net():
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))


X = torch.ones(2, 64)


def test_interrupt_while_staging(monkeypatch):
    module = net()
    wanted, calls = module(X), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return _original(*args, **kwargs)

    _original = _donors.shard_on
    monkeypatch.setattr(_donors, "shard_on", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0)
    monkeypatch.undo()
    del caught
    calls.clear()
    gc.collect()
    assert not any(distorch.is_sharded(p) for p in module.parameters())
    assert "_distorch" not in module.__dict__
    assert torch.equal(module(X), wanted)
    assert donor_files() == []


def _interrupt_at(monkeypatch, target, name, call):
    """Ctrl-C at the `call`-th call of target.name."""
    original, calls = getattr(target, name), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, interrupted)


INTERRUPTS = {
    "swapping": (swapping, "replace_data", 5),
    "agents": (ModuleAgent, "install", 3),
    "end": (placing.compiled, "watch", 1),
    "done": (contextlib.ExitStack, "pop_all", 1),
}


@pytest.mark.parametrize("where", INTERRUPTS)
def test_interrupt_of_distribute(monkeypatch, where):
    module = net()
    wanted = module(X)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _interrupt_at(patched, *INTERRUPTS[where])
        distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0)
    assert not any(distorch.is_sharded(p) for p in module.parameters())
    assert torch.equal(module(X), wanted)
    assert module.double()(X.double()).dtype is torch.float64  # no agent is left behind


@pytest.mark.parametrize("where", INTERRUPTS)
def test_interrupt_of_redistribute(monkeypatch, where):
    module = distorch.distribute(net(), "cpu,0b;disk,*", min_bytes=0)
    wanted, before = module(X), distorch.report(module).placement
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _interrupt_at(patched, *INTERRUPTS[where])
        distorch.redistribute(module, "cpu,50%;disk,50%")
    assert distorch.report(module).placement == before
    assert distorch.report(module).ok
    assert torch.equal(module(X), wanted)


@pytest.mark.parametrize(
    "where", [(ModuleAgent, "remove", 3), (contextlib.ExitStack, "pop_all", 1)]
)
def test_interrupt_of_undistribute(monkeypatch, where):
    module = distorch.distribute(net(), "cpu,0b;disk,*", min_bytes=0)
    wanted = module(X)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _interrupt_at(patched, *where)
        distorch.undistribute(module)
    assert distorch.report(module).ok
    assert torch.equal(module(X), wanted)
    assert torch.equal(distorch.undistribute(module)(X), wanted)


def test_file_truncated_while_running(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(net().state_dict(), path)
    module = distorch.load(net(), path, "cpu,0b;disk,*", min_bytes=0, prefetch=0)
    wanted = module(X)
    data = path.read_bytes()
    os.truncate(path, len(data) // 2)
    with pytest.raises(distorch.FetchError, match=r"weight '0\.weight'.*bytes.*load the model"):
        module(X)
    assert distorch.is_sharded(module[0].weight)
    again = distorch.load(net(), _copy(tmp_path, data), "cpu,0b;disk,*", min_bytes=0)
    assert torch.equal(again(X), wanted)


def test_file_changed_while_running(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(net().state_dict(), path)
    module = distorch.load(net(), path, "cpu,0b;disk,*", min_bytes=0, prefetch=0)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, (1, 1))
    with pytest.raises(distorch.FetchError, match="written to after it was opened"):
        module(X)


def _copy(folder, data):
    path = folder / "copy.safetensors"
    path.write_bytes(data)
    return path


def test_disk_full(tmp_path):
    """A file size limit stands for a full disk: the system refuses the donor file's room."""
    program = """
        import resource, signal, torch, distorch
        from torch import nn
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        module = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
        wanted = module(torch.ones(2, 256))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 256 * 256 * 4, resource.RLIM_INFINITY))
        try:
            distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0)
        except distorch.PlacementError as error:
            assert "no room" in str(error) and "DISTORCH_DISK" in str(error), error
        else:
            raise SystemExit("no error")
        assert not any(distorch.is_sharded(p) for p in module.parameters())
        assert torch.equal(module(torch.ones(2, 256)), wanted)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0)
        assert torch.equal(module(torch.ones(2, 256)), wanted)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9 * 256 * 256 * 4, resource.RLIM_INFINITY))
        try:
            module.double()
        except distorch.PlacementError as error:
            assert "no room" in str(error), error
        else:
            raise SystemExit("no error")
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert torch.equal(module(torch.ones(2, 256)), wanted)
        assert distorch.report(module).ok
        print("as before")
    """
    environment = {**os.environ, "DISTORCH_DISK": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "as before", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_cannot_be_a_donor(tmp_path):
    """A pipe would wait for a writer, and a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path, tmp_path / "pipe", "/dev/zero":
        with pytest.raises(distorch.FormatError, match="no ordinary file, but a folder, a pipe"):
            torch.ops.distorch.shard_file(str(path), 0, [16], torch.uint8, "cpu", "w")


def test_failed_load_leaves_the_module(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file(net().state_dict(), path)
    module = net()
    wanted = module(X)

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("distorch.runtime.placing._install", broken)
    with pytest.raises(KeyboardInterrupt):
        distorch.load(module, path, "cpu,0b;disk,*", min_bytes=0)
    assert torch.equal(module(X), wanted)
    assert not any(distorch.is_sharded(p) for p in module.parameters())


@pytest.mark.parametrize("prefetch", [0, "2mib"])
def test_fork_after_use(prefetch):
    """A child process reads with threads of its own, also when a read was under way.

    Elementwise ops of one thread: OpenMP itself does not survive a fork.
    """
    module = distorch.distribute(net(), "cpu,0b;disk,*", min_bytes=0, prefetch=prefetch)
    weights = [p for p in module.parameters() if p.dim() == 2]

    def values():
        return torch.stack([w.detach() + 0 for w in weights])

    wanted = values()
    values()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(values(), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(values(), wanted)


class Kept(nn.Module):
    """A weight that is read by calls: a change of placement waits for those (runtime/changes.py)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self):
        return self.weight.detach() + 0


def test_forks_beside_busy_threads():
    """Threads move weights between disk and memory, and read them: a child finds nothing half done.

    Elementwise ops of one thread, as above. A child reads every weight, and makes scratch donors.
    """
    module = nn.ModuleList(Kept() for _ in range(6))
    wanted = [kept() for kept in module]
    distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, prefetch="1mib")
    stop = threading.Event()
    wrong = []

    def read_all():
        assert all(torch.equal(kept(), w) for kept, w in zip(module, wanted, strict=True))

    def move_all():
        for spec in ("cpu,*", "cpu,0b;disk,*", "cpu,*;disk,50%"):
            distorch.redistribute(module, spec)
            distorch.stats(module)

    def again_and_again(work):
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            wrong.append(error)
            raise

    def look_in_child():
        signal.alarm(60)  # a mutex that nobody gives back would hang here
        read_all()
        distorch.distribute(net(), "cpu,0b;disk,*", min_bytes=0)(X)

    threads = [
        threading.Thread(target=again_and_again, args=(work,))
        for work in (read_all, read_all, move_all)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    look_in_child()
                    os._exit(0)
                os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("spec", ["cpu,0b;disk,*", "cpu,*"])
@pytest.mark.usefixtures("two_threads")
def test_fork_after_decoding(spec):
    """Who asks for a weight decodes it, in a child without the parent's threads."""
    module = nn.Sequential(nn.Linear(512, 512, bias=False))
    before = module[0].weight.detach().clone()
    module = distorch.distribute(module, spec, min_bytes=0, prefetch=0)
    lora = {"0.lora_A.weight": torch.randn(4, 512), "0.lora_B.weight": torch.randn(512, 4)}
    distorch.set_loras(module, [(lora, 1.0)], lora_mode="fetch")
    torch.ones(2048, 2048).add_(1)  # on both threads
    weight = module[0].weight
    wanted = weight.detach()[:2] + 0
    assert not torch.equal(wanted, before[:2])
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(weight.detach()[:2] + 0, wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_copies_and_originals_are_apart():
    module = distorch.distribute(net(), "cpu,0b;disk,*", min_bytes=0)
    twin = copy.deepcopy(module)
    del module
    assert twin(X).shape == (2, 64)
