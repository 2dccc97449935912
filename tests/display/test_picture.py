# SPDX-License-Identifier: Apache-2.0
"""Pictures as SVG and PNG: what stands in them, and how they are written."""

import base64
import io
import sys
from xml.etree import ElementTree

import pytest
from PIL import Image

import distorch
from distorch.display.picture import Picture, Rect, Text, text_width
from distorch.errors import printable

SVG = "{http://www.w3.org/2000/svg}"
BLUE = "#0000ff"


def picture(*shapes, title="t"):
    return Picture(title, 40, 20, shapes)


def parsed(made):
    return ElementTree.fromstring(made.svg())


HOSTILE = [
    "<script>alert(1)</script>", '"onload="x', "a&b]]>", "line\nbreak\r\t", "\x00\x0b\x1f", "\ud800",
    "\u202eright to left", "😀 中文", "'); DROP", "--><!--",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_files_are_only_text(name):
    made = picture(Text(1, 10, name), Rect(0, 0, 5, 5, BLUE, name), title=name)
    root = parsed(made)
    kinds = {element.tag for element in root.iter()}
    assert kinds == {f"{SVG}svg", f"{SVG}title", f"{SVG}rect", f"{SVG}text"}
    shown = [root.find(f"{SVG}title").text, root.find(f"{SVG}text").text]
    shown.append(root.findall(f"{SVG}rect")[1].find(f"{SVG}title").text)
    assert set(shown) == {printable(name)}
    assert made.png()


def test_letters_stay_and_what_moves_them_goes():
    assert printable("blocks.0 中文 😀") == "blocks.0 中文 😀"
    assert printable("a\nb\u202ec\u200d\ud800") == "a�b�c��"


def test_a_png_has_two_pixels_for_one():
    image = Image.open(io.BytesIO(picture(Rect(10, 5, 4, 3, BLUE)).png()))
    assert image.size == (80, 40)
    blue = [
        (x, y) for x in range(80) for y in range(40) if image.getpixel((x, y)) == (0, 0, 255)
    ]  # fmt: skip
    assert (min(blue), max(blue)) == ((20, 10), (27, 15))
    assert len(blue) == 8 * 6


def test_a_png_has_letters():
    image = Image.open(io.BytesIO(picture(Text(2, 15, "WWW", "#ff0000")).png()))
    red = [x for x in range(80) for y in range(40) if image.getpixel((x, y)) == (255, 0, 0)]
    assert len(red) > 100 and min(red) >= 4 and max(red) > 60


def test_no_rectangle_of_a_png_covers_its_neighbour():
    """However thin they are; and what is thinner than half a pixel vanishes."""
    thin = [Rect(0.3 * i, 0, 0.3, 20, f"#{i:02x}0000") for i in range(1, 130)]
    flat = [Rect(0, 0.01 * i, 40, 0.01, "#00ff00") for i in range(1, 20)]
    for shapes in (thin, flat, [Rect(1, 1, 0, 0, BLUE)]):
        assert picture(*shapes).png() and picture(*shapes).image(1)
    row = [picture(*thin).image(2).getpixel((x, 3))[0] for x in range(1, 77)]
    assert row == sorted(row) and len(set(row)) > 70


@pytest.mark.parametrize(
    "text", ["TEXT_MODEL_WM", "WWWWMMMM", "blocks.12.attention", "il.1", "100%"]
)
def test_no_text_is_wider_than_it_is_taken_to_be(text):
    from PIL import ImageFont

    for size in (10, 12, 14):
        wide = ImageFont.load_default(size=size).getlength(text)
        assert wide <= text_width(text, size) < 2 * wide


def test_the_same_picture_for_the_eye_and_for_the_pointer():
    root = parsed(picture(Rect(1, 2, 3, 4, BLUE, "here"), Text(5, 6, "word", anchor="end")))
    rect, text = root.findall(f"{SVG}rect")[1], root.find(f"{SVG}text")
    assert [rect.get(k) for k in ("x", "y", "width", "height", "fill")] == [
        "1",
        "2",
        "3",
        "4",
        BLUE,
    ]
    assert rect.find(f"{SVG}title").text == "here"
    assert (text.get("x"), text.get("text-anchor"), text.text) == ("5", "end", "word")


def test_save(tmp_path):
    made = picture(Rect(0, 0, 5, 5, BLUE))
    made.save(tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text() == made.svg()
    made.save(str(tmp_path / "p.PNG"))
    assert (tmp_path / "p.PNG").read_bytes() == made.png()
    assert made.saved(tmp_path / "q.svg") is made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.PNG", "p.svg", "q.svg"]


def test_what_cannot_be_saved(tmp_path, monkeypatch):
    made = picture()
    for path in ("p", "p.pdf", "p.svg.gz", "", ".svg", 3, None, b"p.svg"):
        with pytest.raises(distorch.SpecError, match=r"ends in \.svg or \.png"):
            made.save(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is not there; make it"):
        made.save(tmp_path / "nowhere" / "p.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.svg' is a folder"):
        made.save(tmp_path / "folder.svg")
    (tmp_path / "folder.svg").rmdir()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", no_room)
        with pytest.raises(OSError, match=r"No space left .*new\.svg'$") as caught:
            made.save(tmp_path / "new.svg")
        assert "tmp" not in caught.value.filename.removeprefix(str(tmp_path))
    for name in ("kept.png", "kept.svg"):
        (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(Picture, "png", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.save(tmp_path / "kept.png")
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.save(tmp_path / "kept.svg")
    left = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    assert left == [("kept.png", b"old"), ("kept.svg", b"old")]


def no_room(descriptor):
    raise OSError(28, "No space left on device")


def test_jupyter_gets_both_kinds():
    made = picture(Rect(0, 0, 5, 5, BLUE))
    found = made._repr_mimebundle_()
    assert found["image/svg+xml"] == made.svg()
    assert base64.b64decode(found["image/png"]) == made.png()
    assert found["text/plain"] == "<Picture: t, 40 x 20>"
    assert list(made._repr_mimebundle_(include={"image/png"})) == ["image/png"]
    assert "image/png" not in made._repr_mimebundle_(exclude={"image/png"})


@pytest.mark.parametrize("why", ["absent", "old"])
def test_without_pillow(why, tmp_path, monkeypatch):
    if why == "absent":
        monkeypatch.setitem(sys.modules, "PIL", None)
    else:
        monkeypatch.setattr("PIL.ImageFont.load_default", lambda: None)  # before 10.1: no size
    made = picture(Text(1, 10, "a"))
    for call in (made.png, lambda: made.save(tmp_path / "p.png")):
        with pytest.raises(ImportError, match="pip install pillow"):
            call()
    assert set(made._repr_mimebundle_()) == {"text/plain", "image/svg+xml"}
    made.save(tmp_path / "p.svg")
