# SPDX-License-Identifier: Apache-2.0
"""What `calibrate` remembers: for this user alone, and believed only if it can be true."""

import json
import math
import os
import stat

import pytest

import distorch
from distorch.machine import links

LINK = {"donor": "cpu", "compute": "sim:0", "rate": 2e9, "latency": 1e-5, "together": 1e9,
        "back": None}  # fmt: skip
SPEED = {
    "device": "sim:0",
    "memory": 9e11,
    "flops": 2e13,
    "half_flops": 2e13,
    "issue": 2e-6,
    "event": 3e-7,
}
RIGHT = {"version": 3, "links": [LINK], "speeds": [SPEED]}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache file of a user who has measured nothing yet, in this process or before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(links, "_known", {})
    monkeypatch.setattr("distorch._donors.link_rates", {})
    monkeypatch.setattr(links, "_measure", lambda donor, compute: links.Link(**LINK))
    monkeypatch.setattr(links, "_speed", lambda compute: links.Speed(**SPEED))
    monkeypatch.setattr(links, "_with_others", lambda found: found)
    monkeypatch.setattr(links, "is_simulated", lambda compute: False)
    return links._cache_file()


def forget():
    links._known.clear()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_only_the_user_can_read_it(cache, mask):
    before = os.umask(mask)
    try:
        cache.parent.parent.mkdir(mode=0o777)
        cache.parent.parent.chmod(0o755)
        cache.parent.mkdir()
        cache.parent.chmod(0o775)  # as a careless tool has made it
        distorch.calibrate(progress=False)
    finally:
        os.umask(before)
    assert mode(cache) == 0o600 and mode(cache.parent) == 0o700
    forget()
    assert links.known_links().links[0] == links.Link(**LINK)


def test_a_link_of_somebody_else_is_not_written_through(cache, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    cache.parent.mkdir(parents=True)
    cache.symlink_to(victim)
    distorch.calibrate(progress=False)
    assert victim.read_text() == "mine" and not cache.is_symlink()


WRONG = {
    "not JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "no links": '{"version": 3, "speeds": []}',
    "no speeds": json.dumps({"version": 3, "links": [LINK]}),
    "another version": json.dumps(RIGHT | {"version": 1}),
    "of no version": json.dumps({"links": [LINK], "speeds": [SPEED]}),
    "a name more": json.dumps(RIGHT | {"links": [LINK | {"more": 1}]}),
    "binary": "\x80\x81",
    **{
        f"{key} {value!r:.12}": json.dumps(RIGHT | {"links": [LINK | {key: value}]})
        for key, value in [
            ("rate", 0), ("rate", -1), ("rate", math.nan), ("rate", math.inf), ("rate", "1"),
            ("rate", True), ("rate", None), ("rate", 10**400), ("together", 0), ("back", -2.0),
            ("rate", 1e308), ("rate", 1e-300), ("together", 1e300),
            ("latency", -1), ("latency", math.nan), ("donor", 3), ("compute", None),
        ]
    },
    **{
        f"{key} {value!r:.12}": json.dumps(RIGHT | {"speeds": [SPEED | {key: value}]})
        for key, value in [
            ("device", 3), ("memory", 0), ("memory", math.inf), ("flops", -1.0), ("flops", "1"),
            ("issue", -1e-6), ("issue", math.nan), ("event", None), ("event", True),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_true_is_measured_again(cache, kind):
    cache.parent.mkdir(parents=True, mode=0o700)
    cache.write_text(WRONG[kind], encoding="latin-1")
    cache.chmod(0o600)
    assert links.known_links() is None
    assert all(not device.links for device in distorch.devices().values())
    distorch.calibrate(progress=False)
    forget()
    assert links.known_links() is not None


@pytest.mark.parametrize("kind", ["others write", "others write the folder", "pipe", "folder"])
def test_what_others_may_have_written_is_not_believed(cache, kind):
    cache.parent.mkdir(parents=True, mode=0o700)
    if kind == "pipe":
        os.mkfifo(cache)
    elif kind == "folder":
        cache.mkdir()
    else:
        cache.write_text(json.dumps(RIGHT))
        cache.chmod(0o600)
        assert links.known_links() is not None
        forget()
        (cache if kind == "others write" else cache.parent).chmod(0o707)
    assert links.known_links() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_files_of_another_user_are_not_believed(cache):
    cache.parent.mkdir(parents=True, mode=0o700)
    cache.write_text(json.dumps(RIGHT))
    cache.chmod(0o600)
    os.chown(cache, 12345, -1)
    assert links.known_links() is None
    os.chown(cache, 0, -1)
    os.chown(cache.parent, 12345, -1)
    assert links.known_links() is None
    distorch.calibrate(progress=False)  # it cannot be remembered, and that is all
    assert links.known_links() is not None
    forget()
    assert links.known_links() is None
