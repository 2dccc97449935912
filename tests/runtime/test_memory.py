# SPDX-License-Identifier: Apache-2.0
"""How much RAM a process may use: the limits of the control groups that it is in."""

import os
from types import SimpleNamespace

import pytest

from distorch import _memory

GB = 1 << 30


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Writes the files of a group, on a machine with 64 GB of which 60 are free."""
    monkeypatch.setattr(_memory, "_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(_memory, "_OWN", tmp_path / "own")
    machine = SimpleNamespace(total=64 * GB, available=60 * GB)
    monkeypatch.setattr(_memory.psutil, "virtual_memory", lambda: machine)

    def write(own, path, limit, used, stat="", version=2):
        (tmp_path / "own").write_bytes(os.fsencode(own))
        folder = tmp_path / "mount" / ("memory" if version == 1 else ".") / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
        for name, value in zip(names, (limit, used), strict=True):
            (folder / f"memory.{name}").write_text(f"{value}\n")
        (folder / "memory.stat").write_text(stat)

    return write


def test_no_groups_at_all(group):
    assert _memory.host_memory() == (64 * GB, 60 * GB)


def test_a_container(group):
    group("0::/\n", ".", 8 * GB, 3 * GB)
    assert _memory.host_memory() == (8 * GB, 5 * GB)


def test_a_container_that_is_told_the_path_of_its_host(group):
    group("0::/docker/4f3a\n", ".", 8 * GB, 3 * GB)
    assert _memory.host_memory() == (8 * GB, 5 * GB)


@pytest.mark.parametrize("own", ["", "1:name=systemd:/\n", "0::/lat\udcff\n", "nonsense"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_is_told_nothing_of_use(group, own, version):
    group(own, ".", 8 * GB, 3 * GB, version=version)
    assert _memory.host_memory() == (8 * GB, 5 * GB)


def test_a_group_that_is_slowed_down_before_its_limit(group, tmp_path):
    group("0::/\n", ".", 8 * GB, 3 * GB)
    (tmp_path / "mount" / "memory.high").write_text(f"{4 * GB}\n")
    assert _memory.host_memory() == (8 * GB, 1 * GB)


def test_a_group_within_others(group):
    """As jobs of Slurm: the limit of the job, not that of the step, is the lower one."""
    own = "0::/system.slice/slurmstepd.scope/job_7/step_0\n"
    path = "system.slice/slurmstepd.scope/job_7"
    group(own, f"{path}/step_0", "max", 1 * GB)
    group(own, path, 16 * GB, 4 * GB)
    group(own, "system.slice", 48 * GB, 20 * GB)
    assert _memory.host_memory() == (16 * GB, 12 * GB)


def test_files_that_were_read_do_not_count_as_used(group):
    """A checkpoint that was downloaded in a container fills its group with pages of that file."""
    stat = f"anon {GB}\nfile {7 * GB}\ninactive_file {4 * GB}\nactive_file {2 * GB}\nshmem {GB}\n"
    group("0::/\n", ".", 8 * GB, 8 * GB, stat)
    assert _memory.host_memory() == (8 * GB, 6 * GB)


def test_the_first_version_of_groups(group):
    own = "9:name=systemd:/\n4:memory:/jobs/7\n2:cpu,cpuacct:/\n0::/\n"
    stat = f"total_inactive_file {GB}\ntotal_active_file {GB}\ninactive_file {5 * GB}\n"
    group(own, "jobs/7", 8 * GB, 7 * GB, stat, version=1)
    group(own, ".", 1 << 62, 30 * GB, version=1)  # no limit
    assert _memory.host_memory() == (8 * GB, 3 * GB)


@pytest.mark.parametrize("own", ["4:memory", "0::/no/such/group\n", "0::/../..\n"])
def test_a_group_that_the_process_is_not_in(group, own):
    group(own, "other", 8 * GB, GB)
    assert _memory.host_memory() == (64 * GB, 60 * GB)


def test_a_group_that_is_over_its_limit(group):
    group("0::/\n", ".", 8 * GB, 9 * GB)
    assert _memory.host_memory() == (8 * GB, 0)
