# SPDX-License-Identifier: Apache-2.0
"""Runs the code of a Markdown page, block by block, as a reader would.

* `python` blocks of a page run in one namespace, from the top to the bottom.
* `sh` blocks run line by line: `distorch` in this process, `make` as `make -n`. NOT_RUN lists the
  lines that are not run, with the reason.
* A `text` block right behind a block is what that block prints. "..." stands for anything; widths
  of columns are not compared.

There is no GPU here: `cuda` is read as the simulated accelerator `sim`, but for what is planned for
another machine.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import subprocess
from pathlib import Path

from sybil import Document, Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.region import Lexeme

from distorch import cli

ROOT = Path(__file__).parents[2]
# The first words of lines that are not run (behind variables of the environment), and why.
NOT_RUN = {
    "pip install": "changes the environment; tests/architecture/test_build.py looks at the metadata",
    "uv pip install": "as pip install",
    "/path/to/ComfyUI/venv/bin/python -m pip install": "as pip install",
    "cp -r comfyui-distorch": "copies into a ComfyUI; `make test-comfy` does that",
    "export ": "environment variables, each tested where it is read",
    "python -m tests.": "takes minutes to hours; tests/conformance and tests/gpu_report run parts",
    "python3 -m tests.": "takes minutes to hours; tests/gpu_report runs parts of it",
    ".venv/bin/python benchmarks/gpu.py": "wants a GPU; tests/benchmarks/test_gpu.py runs it, tiny",
}
_ELSEWHERE = re.compile(r"machine=|--machine|Machine\.")
_CHECKER = doctest.OutputChecker()
_HOW = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_PRINTED = "printed by the block before"
_VARIABLES = re.compile(r"^(?:[A-Z_]+=(?:\"[^\"]*\"|\S*)\s+)+")


def as_simulated(text: str) -> str:
    """The text for a machine that has the simulated accelerator instead of GPUs."""
    if _ELSEWHERE.search(text):
        return text
    return text.replace("cuda:", "sim:").replace('"cuda"', '"sim"')


def run_python(example: Example) -> None:
    """Runs a block, and keeps what it printed."""
    source = example.parsed
    example.parsed = Lexeme(as_simulated(source), source.offset, source.line_offset)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        PythonEvaluator()(example)
    example.namespace[_PRINTED] = (example.end, out.getvalue())


def run_shell(example: Example) -> None:
    """Runs the lines of a block, and keeps what they printed."""
    printed = ""
    for line in _lines(example.parsed):
        command = _VARIABLES.sub("", line)
        if not any(command.startswith(words) for words in NOT_RUN):
            printed += run_line(command)
    example.namespace[_PRINTED] = (example.end, printed)


def _lines(block: str) -> list[str]:
    """The commands of a block, without comments; a backslash joins lines."""
    joined = block.replace("\\\n", " ").splitlines()
    commands = (" ".join(shlex.split(line, comments=True)) for line in joined)
    return [
        line.split(" #")[0].strip() for line, kept in zip(joined, commands, strict=True) if kept
    ]


def run_line(line: str) -> str:
    """What one command prints. AssertionError if it fails, or is neither `distorch` nor `make`."""
    words = shlex.split(line)
    if words[0] == "distorch":
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = cli.main(shlex.split(as_simulated(line))[1:])
        assert status == 0, f"{line!r} ended with {status}: {out.getvalue()}"
        return out.getvalue()
    assert words[0] == "make", f"{line!r} is not run, and NOT_RUN does not say why"
    done = subprocess.run(
        ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line!r}: {done.stderr}"
    return ""


def check_output(example: Example) -> None:
    """A block of text is what the code right before it prints."""
    end, printed = example.namespace.get(_PRINTED, (-1, ""))
    where = f"{example.path}, line {example.line}"
    behind = end >= 0 and not example.document.text[end : example.start].strip()
    assert behind, f"{where}: a `text` block stands right behind the code that prints it"
    wanted, found = (_narrow(text.replace("cuda:", "sim:")) for text in (example.parsed, printed))
    assert _CHECKER.check_output(wanted, found, _HOW), (
        f"{where}: the page says\n{wanted}\nand the code prints\n{found}"
    )


def _narrow(text: str) -> str:
    """With short rules under heads: their lengths go with names of devices."""
    return re.sub(r"-{3,}", "---", text.strip())


_SYBIL = Sybil(
    parsers=[
        CodeBlockParser("python", run_python),
        CodeBlockParser("sh", run_shell),
        CodeBlockParser("text", check_output),
    ],
    path=str(ROOT),
)


def parse(path: Path) -> Document:
    """The blocks of a page."""
    return _SYBIL.parse(path)
