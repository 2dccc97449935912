# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all, and else as an ordinary write would."""

import os
import stat
import threading

import pytest

from distorch._small_files import write_atomically


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


def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "x", "")
    assert caught.value.filename == str(tmp_path / "none" / "x")
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, "")
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
