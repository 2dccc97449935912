# SPDX-License-Identifier: Apache-2.0
"""Pictures of plans and reports: their areas are the bytes."""

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distorch.display import placements
from distorch.display.page import EDGE, WIDTH, colours_of, ticks
from distorch.display.picture import RED, Rect, Text
from distorch.display.placements import device_bar, part_bars, placement_strip

DEVICES = ("cuda:0", "cpu", "disk")
ROOM = WIDTH - 2 * EDGE
GiB = 1 << 30


def held_of(weights):
    held = dict.fromkeys(DEVICES, 0)
    for _, nbytes, device in weights:
        held[device] += nbytes
    return held


def strip(weights):
    return placement_strip("s", weights, held_of(weights), {"cuda:0"})


def blocks(made):
    """The rectangles that stand for weights: the pointer shows which."""
    return [shape for shape in made.shapes if isinstance(shape, Rect) and shape.title]


def areas(made):
    """Device -> share of what is coloured."""
    names = {colour: name for name, colour in colours_of(DEVICES).items()}
    found = defaultdict(float)
    for rect in blocks(made):
        found[names[rect.colour]] += rect.width * rect.height
    whole = sum(found.values())
    return {name: area / whole for name, area in found.items()}


def texts(made):
    return [shape.text for shape in made.shapes if isinstance(shape, Text)]


sizes = st.one_of(st.integers(0, 100), st.integers(0, 1 << 40))


@pytest.fixture
def without_gaps(monkeypatch):
    """Nothing white between blocks, so that areas are exact."""
    monkeypatch.setattr(placements, "_GAP", 0.0)


@given(st.lists(st.tuples(st.just("w"), sizes, st.sampled_from(DEVICES)), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_strip_has_the_share_of_each_device(without_gaps, weights):
    made, held = strip(weights), held_of(weights)
    total = sum(held.values())
    for rect in blocks(made):
        assert rect.x >= EDGE - 1e-6 and rect.x + rect.width <= WIDTH - EDGE + 1e-6
    if total:
        shown = areas(made)
        for device, nbytes in held.items():
            assert shown.get(device, 0) == pytest.approx(nbytes / total, abs=1e-9)


@pytest.mark.parametrize("count", [10_000, 100_000])
def test_weights_too_narrow_to_be_seen_keep_their_proportion(count):
    weights = [(f"w{i}", 4096, DEVICES[(i % 10 > 2) + (i % 10 > 8)]) for i in range(count)]
    made = strip(weights)
    assert areas(made) == pytest.approx({"cuda:0": 0.3, "cpu": 0.6, "disk": 0.1}, abs=0.01)
    assert len(made.svg()) < 500_000
    assert blocks(made)[0].title.startswith("w0 … w")
    assert blocks(made)[0].title.endswith("on cuda:0")


def test_each_wide_weight_is_a_block_in_its_order():
    made = strip(
        [("a", GiB, "cpu"), ("none", 0, "disk"), ("b", 2 * GiB, "cuda:0"), ("c", GiB, "cpu")]
    )
    assert [rect.title for rect in blocks(made)] == [
        "a: 1.00 GiB on cpu", "b: 2.00 GiB on cuda:0", "c: 1.00 GiB on cpu"
    ]  # fmt: skip
    a, b, c = blocks(made)
    assert a.x == EDGE and b.x == EDGE + ROOM / 4 and c.x == EDGE + 3 * ROOM / 4
    assert "cuda:0 (compute): 2.00 GiB, 50.0%" in texts(made)
    assert "cpu: 2.00 GiB, 50.0%" in texts(made)
    assert {"0", "1 GiB", "4 GiB"} <= set(texts(made))


def covered(made):
    """Colour of each pixel of the strip, at two pixels for one."""
    image = made.image(2)
    left, right = 2 * EDGE, 2 * (WIDTH - EDGE)
    top = round(2 * blocks(made)[0].y)
    return [image.getpixel((x, y)) for x in range(left, right) for y in range(top, top + 2 * 44)]


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("devices", [DEVICES, ("disk", "cpu", "cuda:0")])
def test_a_png_has_these_shares_too(without_gaps, devices):
    """Small weights between large ones: their parts of a column are thinner than a pixel."""
    weights = []
    for block in range(200):
        weights += [(f"b.{block}.bias", 2560, "cuda:0"), (f"b.{block}.q", 3 << 20, devices[0]),
                    (f"b.{block}.norm", 2560, devices[1]), (f"b.{block}.up", 6 << 20, devices[2])]  # fmt: skip
    made, held = strip(weights), held_of(weights)
    pixels = covered(made)
    for device, colour in colours_of(DEVICES).items():
        share = sum(pixel == rgb(colour) for pixel in pixels) / len(pixels)
        assert share == pytest.approx(held[device] / sum(held.values()), abs=0.02)
    assert made.png()


def test_devices_of_one_column_are_stacked():
    made = strip([(f"w{i}", 1 << 10, DEVICES[i % 3]) for i in range(30_000)])
    columns = defaultdict(list)
    for rect in blocks(made):
        columns[rect.x].append(rect)
    assert len(columns) > 300
    for column in columns.values():
        assert [rect.y for rect in column] == sorted({rect.y for rect in column})
        assert sum(rect.height for rect in column) == pytest.approx(44)
        for above, below in zip(column, column[1:], strict=False):
            assert below.y == pytest.approx(above.y + above.height)
    assert len(set(covered(made))) >= 3


def test_a_giant_beside_many_dwarfs():
    made = strip([("giant", 1 << 40, "disk"), *((f"w{i}", 1, "cpu") for i in range(5000))])
    assert blocks(made)[0].title == "giant: 1.00 TiB on disk"
    assert len(blocks(made)) == 2


def test_nothing_at_all():
    for weights in ([], [("w", 0, "cpu")]):
        assert blocks(strip(weights)) == []
    assert blocks(part_bars("t", {}, dict.fromkeys(DEVICES, 0), {"cuda:0"})) == []


def test_the_bars_of_parts():
    parts = {"embed": {"cpu": GiB}, "layers.0": {"disk": GiB, "cuda:0": 3 * GiB}}
    held = {"cuda:0": 3 * GiB, "cpu": GiB, "disk": GiB}
    made = part_bars(
        "measured", parts, held, {"cuda:0"}, notes=["a LoRA is on"], problems=["x: on cpu"]
    )
    whole, embed, layer = blocks(made)[:3], blocks(made)[3:4], blocks(made)[4:]
    assert [rect.width / ROOM for rect in whole] == pytest.approx([0.6, 0.2, 0.2])
    assert [(rect.x - EDGE) / ROOM for rect in whole] == pytest.approx([0, 0.6, 0.8])
    # Colours are in the order of the legend, and rows have one scale.
    assert [rect.title for rect in layer] == ["cuda:0: 3.00 GiB", "disk: 1.00 GiB"]
    assert layer[1].x == pytest.approx(layer[0].x + layer[0].width)
    assert embed[0].width == pytest.approx(layer[1].width) == pytest.approx(layer[0].width / 3)
    assert {"embed", "layers.0", "1.00 GiB", "4.00 GiB", "a LoRA is on"} <= set(texts(made))
    assert [s.text for s in made.shapes if getattr(s, "colour", "") == RED] == ["x: on cpu"]


def test_a_place_has_one_colour_in_every_picture():
    gpus = [f"cuda:{i}" for i in range(8)]
    everywhere = colours_of([*gpus, "cpu", "disk"])
    assert len(set(everywhere.values())) == 10
    for devices in (["cpu", "disk"], ["disk", "cuda:0", "cpu"], ["cuda:0"], ["cpu+cuda:1", "cpu"]):
        for device in {"cpu", "disk", "cuda:0"} & set(devices):
            assert colours_of(devices)[device] == everywhere[device]


def test_many_parts_share_rows():
    parts = {f"layers.{i}": {"cpu": i} for i in range(1000)}
    made = part_bars("t", parts, {"cpu": 499_500}, {"cpu"})
    assert "layers.0 … 20" in texts(made)
    assert made.height < 1000
    rows = blocks(made)[1:]
    assert sum(rect.width for rect in rows) == pytest.approx(
        rows[-1].width * 499_500 / sum(range(987, 1000))
    )


def test_rows_say_which_parts_they_hold():
    """Whatever the names are, the numbers can be read, and parents are kept apart."""
    parent = "transformer_model_with_a_really_long_name"
    parts = {f"{parent}.{i}": {"cpu": 1} for i in range(61)} | {"head": {"cpu": 1}}
    made = texts(part_bars("t", parts, {"cpu": 62}, {"cpu"}))
    rows = [text for text in made if " … " in text]
    assert rows[0] == "transformer_m…ally_long_name.0 … 1" and rows[-1].endswith(".58 … 59")
    assert any(text.endswith("name.60") for text in made) and "head" in made
    many = {f"part{i}.0": {"cpu": 1} for i in range(500)}
    assert len(blocks(part_bars("t", many, {"cpu": 500}, {"cpu"}))) < 60


def test_parts_are_named_below_the_strip():
    weights = [(f"blocks.{i}.{leaf}", GiB, "cpu") for i in range(4) for leaf in "abc"]
    made = strip([("embed.weight", GiB, "cpu"), *weights])
    named = [s for s in made.shapes if isinstance(s, Text) and s.size == 10]
    assert [s.text for s in named] == ["embed", *(f"blocks.{i}" for i in range(4))]
    assert named[1].x == pytest.approx(EDGE + ROOM / 13 + 3)
    crowded = strip([(f"blocks.{i}.w", GiB, "cpu") for i in range(500)])
    named = [s for s in crowded.shapes if isinstance(s, Text) and s.size == 10]
    assert 8 < len(named) < 20
    assert all(a.x + 40 < b.x for a, b in zip(named, named[1:], strict=False))


def test_long_words_stay_on_the_page():
    name = "transformer_blocks." * 20
    made = part_bars(name, {name: {name: 5}}, {name: 5}, {name}, notes=[name * 9], problems=[name])
    for text in texts(made):
        assert len(text) < WIDTH / 6
    assert device_bar({name: 1}, {name}, name * 3).width == 320


def test_a_bar_for_a_node():
    made = device_bar({"cuda:0": 3, "cpu": 1}, {"cuda:0"}, "cpu->cuda:0 5.00 GB/s")
    assert [rect.width for rect in blocks(made)] == pytest.approx([216, 72])
    assert "cpu->cuda:0 5.00 GB/s" in texts(made)
    wrong = device_bar({"cpu": 1}, {"cpu"}, "w: planned on disk", ok=False)
    assert [s.colour for s in wrong.shapes if getattr(s, "text", "").startswith("w:")] == [RED]


@given(st.floats(1e-9, 1e18))
def test_ticks_are_few_and_round(end):
    found = ticks(end)
    assert 3 <= len(found) <= 9
    assert found[0] == 0 and found[-1] <= end * (1 + 1e-6) < 2 * found[-1]
    step = f"{found[1]:.6e}"
    assert step[0] in "125" and float(step.split("e", maxsplit=1)[0]) in (1, 2, 5)


def test_no_ticks_without_a_length():
    assert ticks(0) == ticks(-1.0) == ticks(float("nan")) == []
