# SPDX-License-Identifier: Apache-2.0
"""examples/tour.ipynb runs from the top to the bottom, and its outputs are what it prints."""

import re

import nbformat
import pytest

from tests.examples import notebook

WRITTEN = notebook.read()


def code(tour):
    return [cell for cell in tour.cells if cell.cell_type == "code"]


def outputs(cell):
    """What a cell shows: kinds, and texts without numbers and widths, which differ each time."""
    shown = []
    for output in cell.outputs:
        if output.output_type == "stream":
            shown.append((output.name, plain(output.text)))
            continue
        kinds = sorted(set(output.data) - {"text/plain", "image/jpeg"})
        shown.append((output.output_type, *kinds, plain(output.data.get("text/plain", ""))))
    return shown


def plain(text):
    text = re.sub(r"\nstalls .*", "", text)  # there may be none
    return re.sub(r"-{2,}|\s+", " ", re.sub(r"[0-9a-f]*\d[\d.a-f]*", "#", text))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return notebook.executed(WRITTEN, tmp_path_factory.mktemp("elsewhere"))


def test_it_shows_what_is_written(ran):
    for written, now in zip(code(WRITTEN), code(ran), strict=True):
        assert outputs(now) == outputs(written), written.source


def test_what_does_not_change_is_the_same_to_the_last_digit(ran):
    """The plan's table, and the pictures of the plan and of both reports."""
    kinds = [("text/plain", "plan"), ("image/svg+xml", "plan.plot()"),
             ("image/svg+xml", "report.plot()"), ("image/svg+xml", "distorch.report(model).plot()")]  # fmt: skip
    for kind, line in kinds:
        now, written = (
            [c for c in code(tour) if c.source.splitlines()[-1] == line] for tour in (ran, WRITTEN)
        )
        assert len(now) == 1, line
        assert now[0].outputs[-1].data[kind] == written[0].outputs[-1].data[kind]


def test_it_proves_what_it_says(ran):
    proofs = [cell for cell in code(ran) if cell.source.splitlines()[-1].startswith("torch.equal")]
    assert [cell.outputs[0].data["text/plain"] for cell in proofs] == ["True", "True"]
    (looked,) = [cell for cell in code(ran) if "report.ok" in cell.source]
    assert looked.outputs[0].text == "True\n"


def test_it_can_be_read_without_being_run():
    nbformat.validate(WRITTEN)
    assert [cell.execution_count for cell in code(WRITTEN)] == list(
        range(1, len(code(WRITTEN)) + 1)
    )
    silent = [cell.id for cell in code(WRITTEN) if not cell.outputs]
    assert silent == [code(WRITTEN)[0].id]  # imports
    pictures = [o.data for cell in code(WRITTEN) for o in cell.outputs if "data" in o]
    # Web pages show no SVG.
    assert all("image/png" in data for data in pictures if "image/svg+xml" in data)
    assert sum("image/png" in data for data in pictures) >= 6


def test_it_says_nothing_of_where_it_was_written():
    text = notebook.TOUR.read_text()
    sources = re.sub(r'"image/(png|jpeg)": "[^"]*"', "", text)
    for word in ("/home", "/tmp", "/root", "/usr", "site-packages", ".venv", "Warning", "widget"):
        assert word not in sources, word
    assert {cell.get("name") for cell in WRITTEN.cells} == {None}
    streams = {o.name for cell in code(WRITTEN) for o in cell.outputs if o.output_type == "stream"}
    assert streams == {"stdout"}


def test_it_takes_the_tour():
    text = "\n".join(cell.source for cell in code(WRITTEN))
    for call in ("plan", "load", "report", "set_loras", "trace", "redistribute", "stats"):
        assert f"distorch.{call}(" in text
