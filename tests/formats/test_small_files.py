# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all, and else as an ordinary write would."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distorch._small_files import (
    kind_of,
    open_regular,
    read_json,
    spare_name,
    write_atomically,
)


def test_an_older_file_is_replaced_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    path.chmod(0o600)
    write_atomically(path, "new ü")
    assert path.read_text() == "new ü"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "y", b"\0\1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "y"]


def test_links_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    real = tmp_path / "folder" / "real"
    real.write_text("old")
    for name, target in (("link", "folder/real"), ("dangling", "folder/none")):
        (tmp_path / name).symlink_to(target)
        write_atomically(tmp_path / name, name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_text() == name


def test_what_is_no_ordinary_file_stays_what_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "through")
    reader.join()
    assert read == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_permissions_of_another_users_file(tmp_path):
    path = tmp_path / "x"
    path.touch()
    os.chown(path, 65534, 65534)
    for before, after in ((0o4777, 0o755), (0o600, 0o600), (0o2640, 0o640)):
        os.chown(path, 65534, 65534)
        path.chmod(before)
        write_atomically(path, "new")
        assert path.read_text() == "new" and path.stat().st_uid == 0
        assert stat.S_IMODE(path.stat().st_mode) == after


KILLED = """
import os, signal, sys
from pathlib import Path
from distorch import _small_files
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
_small_files.write_atomically(Path(sys.argv[1]), "new")
"""


def killed_at_the_last_moment(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("then", ["written", "deleted"])
def test_what_is_left_at_the_last_moment_goes_with_the_next_write(tmp_path, then):
    path = tmp_path / "x.json"
    path.write_text("old")
    for _ in range(2):  # the second one meets what the first has left
        killed_at_the_last_moment(path)
        assert path.read_text() in ("old", "new") and spare_name(path).read_text() == "new"
        assert len(list(tmp_path.iterdir())) == 2
    if then == "deleted":
        path.unlink()
    write_atomically(path, "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and path.read_text() == "newer"


def test_many_write_to_one_path(tmp_path):
    path, errors = tmp_path / "x", []

    def write(letter):
        try:
            for _ in range(200):
                write_atomically(path, letter * 1000)
                found = path.read_text()
                assert found == found[0] * 1000
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abcdef"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == [] and [p.name for p in tmp_path.iterdir()] == ["x"]
    write_atomically(path, "last")
    assert path.read_text() == "last"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stranger_where_the_new_file_would_be_for_a_moment(tmp_path, monkeypatch, kind):
    path = tmp_path / "x"
    path.write_text("old")
    stranger = spare_name(path)
    stranger.mkdir() if kind == "folder" else stranger.write_text("theirs")
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + (kind == "file"))
    write_atomically(path, "new")
    assert path.read_text() == "new" and stranger.exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "x", "")
    assert caught.value.filename == str(tmp_path / "none" / "x")
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, "")
    with pytest.raises(OSError, match="No space left.*'/dev/full'"):
        write_atomically(Path("/dev/full"), "x")
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "x", "new")
    assert caught.value.filename == str(tmp_path / "x")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def full(descriptor):
    raise OSError(28, "No space left on device")


def test_long_names_and_many_at_a_time(tmp_path):
    write_atomically(tmp_path / ("n" * 250), "x")
    path, errors = tmp_path / "x", []

    def write():
        try:
            write_atomically(path, "y" * 100_000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and path.read_text() == "y" * 100_000


def test_a_private_file_is_nobody_elses(tmp_path):
    """Not to be read, not through a link, and not with the permissions of an older file."""
    victim, path = tmp_path / "victim", tmp_path / "x"
    victim.write_text("mine")
    path.symlink_to(victim)
    before = os.umask(0)
    try:
        write_atomically(path, "a", private=True)
        assert victim.read_text() == "mine" and path.read_text() == "a"
        path.chmod(0o666)
        write_atomically(path, "b", private=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "b"


def test_what_lies_under_a_path(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    found = {"file": "file", "pipe": "other", "": "folder", "loop": "", "none": "", "a\0b": "",
             "n" * 300: ""}  # fmt: skip
    assert {name: kind_of(tmp_path / name) for name in found} == found
    for name in ("pipe", "", "none", "loop"):
        with pytest.raises(OSError, match=r"no ordinary file|No such file|symbolic links"):
            open_regular(tmp_path / name)
    assert read_json(tmp_path / "file") == {}


@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_a_killed_process_leaves_no_temporary_file(tmp_path, monkeypatch, nameless):
    """A file has no name before it is complete, where the file system can do that."""
    if not nameless:
        monkeypatch.setattr("os.O_TMPFILE", os.O_DIRECTORY)  # as file systems that cannot answer
    seen = []
    real = os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda fd: (seen.append(len(list(tmp_path.iterdir()))), real(fd))
    )
    write_atomically(tmp_path / "x", "new")
    write_atomically(tmp_path / "x", "newer")
    assert (tmp_path / "x").read_text() == "newer" and len(list(tmp_path.iterdir())) == 1
    assert seen == ([0, 1] if nameless else [1, 2])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_what_a_stranger_put_into_a_shared_folder_is_not_followed(tmp_path, kind):
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    shared.chmod(0o1777)
    path = shared / "plan.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)
    if kind == "link":
        victim.write_text("mine")
    os.chown(path, 12345, -1, follow_symlinks=False)
    os.chown(shared, 0, -1)
    with pytest.raises(
        PermissionError, match=r"another user put a link or a pipe there.*plan\.json"
    ):
        write_atomically(path, "new")
    assert victim.exists() == (kind == "link")
    if kind == "link":
        assert victim.read_text() == "mine"
        os.chown(path, 0, -1, follow_symlinks=False)  # the user's own link is meant
        write_atomically(path, "new")
        assert victim.read_text() == "new"
