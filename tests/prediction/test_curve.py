# SPDX-License-Identifier: Apache-2.0
"""What more memory is worth."""

import json

import pytest

import distorch
from distorch.errors import PlacementError, SpecError
from tests.prediction.programs import ALL_AWAY, MB, chain, configure, ready


def test_a_curve_ends_at_all_resident():
    module, _, step = ready(12)
    before = distorch.report(module).placement
    options = {"min_bytes": 0, "prefetch": "4mb"}
    curve = distorch.curve(module, step, "sim:0,50%;cpu,*", **options)
    assert distorch.report(module).placement == before, "something moved"
    assert curve.device == "sim:0"
    sizes = [nbytes for nbytes, _ in curve.points]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 0 and sizes[-1] == 24 * MB
    assert curve.here == 12 * MB in sizes
    assert curve.points[-1][1] == pytest.approx(curve.resident_seconds, rel=1e-3)
    for nbytes, seconds in curve.points[::3]:
        spec = f"sim:0,{nbytes}b;cpu,*"
        assert seconds == pytest.approx(distorch.predict(module, step, spec, **options).seconds)
    # Between two points by their distance, and nothing new beyond the ends.
    (low, before_), (high, after) = curve.points[2:4]
    assert curve.at((low + high) // 2) == pytest.approx((before_ + after) / 2)
    assert curve.at("1tb") == curve.points[-1][1]
    assert curve.at(0) == curve.points[0][1]


def test_a_curve_is_shown():
    module, _, step = ready(12)
    curve = distorch.curve(module, step, "sim:0,50%;cpu,*", min_bytes=0, prefetch="4mb", points=9)
    text = str(curve)
    assert "here" in text and "knee" in text
    assert "+3.00 MiB on sim:0 saves" in text and "-3.00 MiB on sim:0 costs" in text
    assert curve.knees and all(point in curve.points for point in curve.knees)
    told = json.loads(json.dumps(curve.to_dict()))
    assert told["points"] == [list(point) for point in curve.points]
    assert "bytes of weights on sim:0" in curve.plot().svg()
    assert "<svg" in curve._repr_html_() and "<table" in curve._repr_html_()


def test_the_curve_of_a_donor():
    configure(devices=2, links={("sim:1", "sim:0"): (60e9, 1e-6)})
    module, _, step = ready(12)
    curve = distorch.curve(
        module, step, "sim:0,0b;sim:1,12mb;cpu,*", device="sim:1", min_bytes=0, prefetch="4mb"
    )
    assert curve.device == "sim:1" and curve.here == 12 * MB
    assert curve.points[0][0] == 0 and curve.points[-1][0] == 24 * MB
    assert curve.points[-1][1] < 0.5 * curve.points[0][1], "the second GPU is the faster donor"


def test_a_curve_of_what_is_placed_now():
    module, _, step = ready(6)
    distorch.redistribute(module, "sim:0,6mb;cpu,*", min_bytes=0, prefetch="2mb")
    curve = distorch.curve(module, step, points=3)
    assert curve.here == 6 * MB and curve.spec == "sim:0,6mb;cpu,*"
    assert [nbytes for nbytes, _ in curve.points] == [0, 6 * MB, 12 * MB]


@pytest.mark.parametrize("points", [1, 201, 2.5, True])
def test_a_wrong_number_of_points(points):
    module, _, step = ready(3)
    with pytest.raises(SpecError, match="points=.*from 2 to 200"):
        distorch.curve(module, step, "sim:0,50%;cpu,*", points=points)


def test_what_is_wrong_with_a_curve():
    module, _, step = ready(3)
    with pytest.raises(SpecError, match=r"device='sim:7': expected one that has weights"):
        distorch.curve(module, step, "sim:0,50%;cpu,*", device="sim:7")
    with pytest.raises(PlacementError, match="the step uses"):
        distorch.curve(chain(3, 512), step, ALL_AWAY)
    with pytest.raises(PlacementError, match="not distributed"):
        distorch.curve(chain(3, 1024), step)


def test_progress_counts_points():
    module, _, step = ready(3)
    done = []
    distorch.curve(module, step, "sim:0,50%;cpu,*", points=5, progress=done.append)
    assert sum(done) == 5
