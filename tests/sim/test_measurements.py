# SPDX-License-Identifier: Apache-2.0
"""Calibration and traces, against links whose rates are known."""

import json

import pytest
import torch
from torch import nn

import distorch
from distorch import _donors
from distorch.cli import main
from distorch.machine import links
from distorch.testing import sim

KNOWN = {("cpu", "sim:0"): (6.8e9, 10e-6), ("sim:1", "sim:0"): (20e9, 5e-6)}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(links, "_known", {})
    monkeypatch.setattr(_donors, "link_rates", {})


def test_calibration_finds_the_rates():
    sim.configure(devices=2, links=KNOWN)
    found = distorch.calibrate()
    for (donor, compute), (rate, _) in KNOWN.items():
        assert found.rate(donor, compute) == pytest.approx(rate, rel=0.01)
    for link in found.links:
        if (link.donor, link.compute) in KNOWN:
            assert link.together == pytest.approx(link.rate, rel=0.02)  # they share nothing
            assert 5e-6 < link.latency < 30e-6
    assert distorch.devices()["cpu"].links["sim:0"] == found.rate("cpu", "sim:0")
    assert "6.80" in str(found) and "<table" in found._repr_html_()


def test_shared_links_are_found_out():
    both = {("cpu", "sim:0"): (10e9, 0.0), ("sim:1", "sim:0"): (10e9, 0.0)}
    sim.configure(devices=2, links=both, shared=[set(both)])
    for link in distorch.calibrate().links:
        if (link.donor, link.compute) in both:
            assert link.rate == pytest.approx(10e9, rel=0.01)
            assert link.together == pytest.approx(5e9, rel=0.02)


def test_the_ring_of_a_model_that_is_there_changes_nothing():
    """It may keep a weight of 64 MiB, and a second fetch of that takes no time."""
    sim.configure(devices=2, links=KNOWN, memory="2gb")
    module = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(20)))
    distorch.distribute(module, "sim:0,0b;cpu,*", prefetch="256mb")
    module(torch.zeros(1, 2048, device="sim:0"))
    found = distorch.calibrate()
    for (donor, compute), (rate, latency) in KNOWN.items():
        link = next(k for k in found.links if (k.donor, k.compute) == (donor, compute))
        assert link.rate == pytest.approx(rate, rel=0.01)
        assert link.latency == pytest.approx(latency, rel=0.1)


def test_the_speed_of_a_device_is_found():
    sim.configure(flops=20e12, memory_bandwidth=300e9)
    speed = distorch.calibrate().speed("sim:0")
    assert speed.memory == pytest.approx(300e9, rel=0.01)
    assert speed.flops == pytest.approx(20e12, rel=0.01)
    assert speed.issue == pytest.approx(2e-6, rel=0.01)  # what the simulator's host needs
    assert speed.event == pytest.approx(0.3e-6, rel=0.05)
    assert distorch.calibrate().speed("sim:1") is None


def test_stripes_follow_the_rates():
    sim.configure(devices=2, links={key: (rate, 0.0) for key, (rate, _) in KNOWN.items()})
    assert _donors.stripe_sizes(1 << 20, ["cpu", "sim:1"], "sim:0") == [1 << 19, 1 << 19]
    distorch.calibrate()
    nbytes = 256 << 20
    cpu, peer = _donors.stripe_sizes(nbytes, ["cpu", "sim:1"], "sim:0")
    assert cpu + peer == nbytes and cpu / nbytes == pytest.approx(6.8 / 26.8, rel=0.02)
    striped = distorch.shard(torch.zeros(nbytes // 4), "cpu+sim:1", compute="sim:0")
    seconds = links._best_seconds(lambda: striped[:1].clone(), torch.device("sim:0"))
    assert nbytes / seconds >= 0.97 * (6.8e9 + 20e9)


def test_without_a_device_the_disk_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(links.machine, "devices", lambda: {"cpu": None, "disk": None})
    assert main(["calibrate", "--json"]) == 0
    (link,) = json.loads(capsys.readouterr().out)["links"]
    assert (link["donor"], link["compute"]) == ("disk", "cpu") and link["rate"] > 1e6
    assert links.known_links().rate("disk", "cpu") == link["rate"]
    links._known.clear()
    assert links.known_links().rate("disk", "cpu") == link["rate"]  # from the file
    for file in (tmp_path / "distorch").iterdir():
        file.write_text("damaged")
    links._known.clear()
    assert links.known_links() is None


def chain(count, prefetch):
    module = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(count)))
    return distorch.distribute(module, "sim:0,0b;cpu,*", min_bytes=0, prefetch=prefetch)


EVENT = 0.3e-6  # what the host pays to record one


@pytest.mark.parametrize("count", [1, 5])
def test_stalls_are_exact_without_look_ahead(count):
    sim.configure(flops=1e9, links={("cpu", "sim:0"): (1e8, 0.0)})
    module, x = chain(count, prefetch=0), torch.ones(8, 256, device="sim:0")
    sim.synchronize()
    sim.reset()
    with torch.no_grad():
        module(x)
    # Each weight is asked for when the operator before it has ended. The first one meets an idle
    # stream, and its copy is two events ahead of the stream's wait.
    copy = 256 * 256 * 4 / 1e8
    assert distorch.stats(module).stall_seconds == pytest.approx(count * copy - 2 * EVENT, abs=2e-9)
    sim.synchronize()
    assert sim.now() == pytest.approx(count * (copy + 2 * 8 * 256 * 256 / 1e9), abs=1e-4)
    distorch.reset_stats(module)
    assert distorch.stats(module).stall_seconds == 0


def test_stalls_are_the_gaps_between_operators():
    sim.configure(flops=1e9, links={("cpu", "sim:0"): (1e8, 0.0)})
    module, x = chain(6, prefetch=2 * 256 * 256 * 4), torch.ones(8, 256, device="sim:0")
    with torch.no_grad():
        for _ in range(3):
            module(x)
        sim.synchronize()
        sim.reset()
        distorch.reset_stats(module)
        for _ in range(20):  # more than are held before anybody asks
            module(x)
    sim.synchronize()
    ran = [span for span in sim.timeline() if span.resource == "sim:0"]
    gaps = sum(b.start - a.end for a, b in zip(ran, ran[1:], strict=False))
    stalls = distorch.stats(module).stall_seconds
    assert gaps > 0.1 and stalls == pytest.approx(gaps, rel=1e-4)


def spans_of(path):
    events = json.loads(path.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    return [(rows[e["tid"]], e["name"], e["ts"], e["dur"], e["args"]) for e in events if "dur" in e]


def test_trace_on_a_device(tmp_path):
    sim.configure(links={("cpu", "sim:0"): (1e9, 0.0)})
    module = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    distorch.distribute(module, "sim:0,0b;cpu,*", min_bytes=0, prefetch=2 * 256 * 256 * 4)
    x = torch.randn(8, 256, device="sim:0")
    with torch.no_grad():
        module(x)
        sim.synchronize()
        with distorch.trace(module, tmp_path / "step.json"):
            module(x)
    spans = spans_of(tmp_path / "step.json")
    copies = [span for span in spans if span[0] == "copies cpu->sim:0"]
    assert {name for _, name, *_ in copies} <= {f"{i}.weight" for i in range(4)}
    assert len(copies) >= 2
    for *_, duration, details in copies:
        assert details["bytes"] == 256 * 256 * 4
        assert duration == pytest.approx(details["bytes"] / 1e9 * 1e6, rel=0.01)
    assert [name for track, name, *_ in spans if track == "compute sim:0"] == [
        f"{i}.weight" for i in range(4)
    ]
    assert sum(duration for track, _, _, duration, _ in spans if track == "stalls sim:0") > 100
    assert sim.races() == []


def test_trace_on_the_host(tmp_path):
    module = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    distorch.distribute(module, "cpu,0b;disk,*", min_bytes=0, prefetch=0)
    with distorch.trace(module, tmp_path / "step.json"):
        module(torch.randn(2, 256))
    tracks = {track for track, *_ in spans_of(tmp_path / "step.json")}
    assert tracks == {"compute cpu", "reads", "stalls"}
    module(torch.randn(2, 256))
    with pytest.raises(ZeroDivisionError), distorch.trace(module, tmp_path / "e.json"):
        raise ZeroDivisionError
    assert spans_of(tmp_path / "e.json") == []
    outer, inner = (distorch.trace(module, tmp_path / f"{name}.json") for name in "ab")
    with outer, pytest.raises(distorch.PlacementError, match="already"):
        inner.__enter__()
    with pytest.raises(distorch.PlacementError, match="not distributed"):
        distorch.trace(nn.Linear(1, 1), tmp_path / "c.json").__enter__()
