# SPDX-License-Identifier: Apache-2.0
"""The words of errors that the troubleshooting page quotes are those of the source."""

import ast
import re

import pytest

from tests.docs.snippets import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SHORTEST, LONGEST = 12, 60  # characters that one finds, and that one line of source has
# Quoted beside ours, and PyTorch's, pip's or the system's own.
OF_OTHERS = {
    "No module named 'setuptools'", "No module named 'torch'", "undefined symbol",
    "must be valid exactly by one definition",
    "no kernel image is available for execution on the device", "cannot import name '_C'",
}  # fmt: skip


def source():
    files = [ROOT / "setup.py", *(ROOT / "comfyui-distorch").rglob("*.py")]
    for folder, kinds in (("distorch", "*.py"), ("csrc", "*.h"), ("csrc", "*.c*")):
        files += [p for p in (ROOT / folder).rglob(kinds) if "tests" not in p.parts]
    return "\n".join(path.read_text() for path in files)


SOURCE = source()


def first_cells(part):
    """The first column of a part's tables."""
    rows = [line for line in part.splitlines() if line.startswith("|")]
    cells = [row.strip("|").split(" | ")[0].strip() for row in rows]
    return [cell for cell in cells if not re.fullmatch(r"[-| ]+", cell)]


def quoted(heading):
    part = PAGE.split(f"\n{heading}\n")[1]
    part = part.split("\n## ")[0] if heading.startswith("## ") else re.split(r"\n##+ ", part)[0]
    return [words for cell in first_cells(part) for words in re.findall(r"`([^`]+)`", cell)]


ERRORS = [words for words in quoted("## Errors") if not words.startswith("distorch.")]


def test_the_page_has_them():
    assert len(ERRORS) > 200
    assert len(ERRORS) == len(set(ERRORS))


def test_each_stands_in_the_source():
    assert [words for words in ERRORS if words not in SOURCE] == []
    assert [words for words in ERRORS if not SHORTEST <= len(words) <= LONGEST] == []


@pytest.mark.parametrize(
    "heading", ["## It does not install or import", "### The report is not ok"]
)
def test_other_messages(heading):
    ours = [words for words in quoted(heading) if words not in OF_OTHERS and len(words) > SHORTEST]
    assert ours
    assert [words for words in ours if words not in SOURCE] == []


def test_each_row_says_what_to_do():
    table = PAGE.split("\n## Errors\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert {len(row) for row in rows} == {3}
    assert [row for row in rows if not all(cell.strip() for cell in row)] == []


RAISED = {"SpecError", "PlacementError", "FormatError", "FetchError", "ImportError"}
# Frames around another message, which is on the page; and an error that only `distorch demo` has.
FRAMES = {
    "{}: {}", "{}: {}: {}", "compute {}", "rules={}: {}",
    "placement {}, entry {} ({}, column {}): {}; {}",
    "{}={}: expected {}", "{} puts {} bytes ({}) on {}, which has {} ({}) free; {}",
    "--count and --steps: expected 1 or more",
}  # fmt: skip


def text_of(node):
    """A message as it stands in the source, with {} for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "{}"


def raised_messages():
    for path in sorted((ROOT / "distorch").rglob("*.py")):
        if {"demo", "testing"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in RAISED and call.args:
                yield text_of(call.args[0])


def test_every_error_of_the_python_side_is_on_the_page():
    messages = [m for m in raised_messages() if m.strip("{}") and m not in FRAMES]
    assert len(messages) > 180
    on_page = [words for words in re.findall(r"`([^`\n]+)`", PAGE) if len(words) >= SHORTEST - 4]
    assert [m for m in messages if not any(words in m for words in on_page)] == []
