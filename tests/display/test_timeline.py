# SPDX-License-Identifier: Apache-2.0
"""Timelines: their table, their picture, their file."""

import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distorch
from distorch.display.picture import Rect, Text
from distorch.display.timelines import COPY, FETCHED, READ, STALL
from distorch.timeline import Span, Timeline, _busy

SPANS = [
    Span("copies cpu->cuda:0", "0.weight", 1.000, 1.002, 16_000_000),
    Span("copies cpu->cuda:0", "1.weight", 1.002, 1.004, 16_000_000),
    Span("stalls cuda:0", "0.weight", 1.000, 1.002, 0),
    Span("compute cuda:0", "0.weight", 1.002, 1.006, 0),
    Span("compute cuda:0", "1.weight", 1.006, 1.010, 0),
]


def test_the_table():
    *lines, gaps = str(Timeline(SPANS)).splitlines()
    assert lines[0] == "10.00 ms"
    assert "need not be idle" in gaps
    cells = {" ".join(line.split()[:2]): line.split()[2:] for line in lines[3:]}
    assert cells["compute cuda:0"] == ["2", "8.000", "80.0%"]
    assert cells["copies cpu->cuda:0"] == ["2", "4.000", "40.0%", "30.52", "MiB", "8.00"]
    assert cells["stalls cuda:0"] == ["1", "2.000", "20.0%"]


def test_busy_counts_no_second_twice():
    spans = [Span("reads", "a", 0.0, 0.004, 0), Span("reads", "b", 0.002, 0.006, 0)]
    assert str(Timeline(spans)).splitlines()[3].split()[:4] == ["reads", "2", "6.000", "100.0%"]


def test_as_json_types():
    found = json.loads(json.dumps(Timeline(SPANS).to_dict()))
    assert found["seconds"] == pytest.approx(0.01)
    assert found["tracks"]["copies cpu->cuda:0"] == {
        "spans": 2, "busy_seconds": pytest.approx(0.004), "bytes": 32_000_000
    }  # fmt: skip


def test_the_picture():
    made = Timeline(SPANS).plot()
    blocks = [s for s in made.shapes if isinstance(s, Rect) and s.title]
    assert [rect.colour for rect in blocks] == [FETCHED, FETCHED, COPY, COPY, STALL]
    assert blocks[2].title == "0.weight: 2.000 ms, 15.26 MiB"
    compute, copies = blocks[0], blocks[2]
    assert compute.width == pytest.approx(2 * copies.width, rel=0.02)
    assert compute.x == pytest.approx(
        copies.x + copies.width, abs=1
    )  # it starts when the copy ends
    words = {s.text for s in made.shapes if isinstance(s, Text)}
    assert {"copies cpu->cuda:0", "milliseconds", "0", "10", "copy of a weight"} <= words
    assert "read of a file" not in words


def rows_of(made):
    """Colour -> its rectangles."""
    found = defaultdict(list)
    for shape in made.shapes:
        if isinstance(shape, Rect) and shape.title:
            found[shape.colour].append(shape)
    return found


def drawn_share(rects):
    """Of the width of the row, how much is coloured; 26 pixels are a whole row."""
    return sum(rect.width * rect.height for rect in rects) / 26


def test_a_long_run_is_a_small_picture_with_the_right_areas():
    spans = [Span("stalls cuda:0", f"w{i}", i * 5e-4, i * 5e-4 + 1e-6, 0) for i in range(1000)]
    spans += [Span("compute cuda:0", f"w{i}", i * 5e-4, i * 5e-4 + 4e-4, 0) for i in range(1000)]
    spans += [Span("reads", f"w{i}", i * 1e-5, (i + 0.5) * 1e-5, 4096) for i in range(50_000)]
    made = Timeline(spans).plot()
    assert len(made.svg()) < 300_000
    rows = rows_of(made)
    pixels = 928 - min(rect.x for rect in rows[READ]) + 16
    assert drawn_share(rows[STALL]) / pixels == pytest.approx(0.002, abs=0.001)
    assert drawn_share(rows[FETCHED]) / pixels == pytest.approx(0.8, abs=0.1)
    assert drawn_share(rows[READ]) / pixels == pytest.approx(0.5, abs=0.02)
    assert rows[READ][0].title.endswith("the first: w0: 0.005 ms, 4.00 KiB")
    assert rows[READ][0].title.split(" ")[1] == "pieces,"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.05)), min_size=1, max_size=40))
def test_areas_are_seconds(pairs):
    found = [Span("reads", "w", a, a + took, 0) for a, took in pairs]
    found.append(Span("stalls", "all of the time", 0.0, 1.05, 0))
    rows = rows_of(Timeline(found).plot())
    (whole,) = rows[STALL]
    for rect in rows[READ]:
        assert whole.x - 1e-6 <= rect.x and rect.x + rect.width <= whole.x + whole.width + 4
    # Wide pieces that overlap are drawn over each other, and have a gap of 0.8 pixels.
    second = (whole.width + 0.8) / 1.05
    wanted = sum(took for _, took in pairs) * second
    assert drawn_share(rows[READ]) <= wanted + 1e-3
    assert drawn_share(rows[READ]) >= _busy(
        sorted(found[:-1], key=lambda s: s.start)
    ) * second - 0.9 * len(pairs)


def test_nothing_was_recorded():
    empty = Timeline()
    assert "nothing was recorded" in str(empty) and "nothing" in empty._repr_html_()
    assert empty.plot().svg()
    assert empty.to_dict() == {"seconds": 0.0, "tracks": {}}
    assert Timeline([Span("reads", "w", 1.0, 1.0, 0)]).plot().svg()


times = st.floats(0, 1e4)
spans = st.builds(
    lambda track, name, start, took, size: Span(track, name, start, start + took, size),
    st.sampled_from(["reads", "stalls", "copies cpu->cuda:0", "new kind"]),
    st.text(), times, times, st.integers(0, 1 << 50),
)  # fmt: skip


@given(st.lists(spans, max_size=20))
def test_a_file_brings_it_back(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("t") / "t.json"
    Timeline(found).save(path)
    again = Timeline.load(path)
    assert again.tracks.keys() == Timeline(found).tracks.keys()
    for track, own in Timeline(found).tracks.items():
        for a, b in zip(own, again.tracks[track], strict=True):
            assert (a.name, a.bytes) == (b.name, b.bytes)
            assert b[2:4] == pytest.approx(a[2:4], rel=1e-9, abs=1e-9)
    again.plot()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=20))
def test_busy_is_the_time_in_which_anything_ran(pairs):
    own = sorted(Span("reads", "w", a, a + took, 0) for a, took in pairs)
    ran = {second for a, took in pairs for second in range(a, a + took)}
    assert _busy(sorted(own, key=lambda span: span.start)) == pytest.approx(len(ran))


OURS = {"otherData": {"writer": "distorch"}}
X = {"ph": "X", "tid": 1, "name": "w", "ts": 0, "dur": 1, "args": {}}
M = {"ph": "M", "tid": 1, "name": "thread_name", "args": {"name": "reads"}}
WRONG = {
    "": "found no JSON",
    "{": "found no JSON",
    "[" * 10**5: "found no JSON",
    "\x1f\x8b": "found no JSON",
    "[]": "a trace of another program",
    "3": "a JSON int",
    '{"a": 1}': "a JSON dict",
    '{"traceEvents": []}': "a trace of another program",
    '{"traceEvents": [], "otherData": {"writer": "torch"}}': "a trace of another program",
    json.dumps(OURS): "damaged",
    json.dumps(OURS | {"traceEvents": 3}): "damaged",
    json.dumps(OURS | {"traceEvents": [3]}): "damaged",
    json.dumps(OURS | {"traceEvents": [X]}): "damaged",  # no track
    json.dumps(OURS | {"traceEvents": [M, X | {"dur": -1}]}): "damaged",
    json.dumps(OURS | {"traceEvents": [M, X | {"dur": float("nan")}]}): "damaged",
    json.dumps(OURS | {"traceEvents": [M, X | {"ts": float("inf")}]}): "damaged",
    json.dumps(OURS | {"traceEvents": [M, X | {"ts": "0"}]}): "damaged",
    json.dumps(OURS | {"traceEvents": [M, X | {"ts": 10**400}]}): "damaged",
}


@pytest.mark.parametrize("content", WRONG, ids=lambda text: text[:30])
def test_files_that_are_none(content, tmp_path):
    (tmp_path / "t.json").write_text(content, encoding="latin-1")
    with pytest.raises(distorch.FormatError, match=WRONG[content]) as caught:
        Timeline.load(tmp_path / "t.json")
    assert "t.json" in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    for path, why in ((tmp_path / "none.json", "No such file"), (tmp_path, "no ordinary file")):
        with pytest.raises(distorch.FormatError, match=f"cannot read the trace .*: {why}"):
            Timeline.load(path)
