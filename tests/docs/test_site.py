# SPDX-License-Identifier: Apache-2.0
"""The pages as a whole: they build, their links lead somewhere, and they agree with the code."""

import importlib.util
import inspect
import re
import subprocess
import sys

import pytest

import distorch
from distorch import integrations
from distorch.errors import SpecError
from distorch.planner import parse_spec
from tests.docs.snippets import ROOT, as_simulated

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    *(ROOT / "distorch").rglob("*.py"), ROOT / "setup.py",
    *(p for p in (ROOT / "csrc").rglob("*.[hc]*") if "tests" not in p.parts),
]  # fmt: skip


def read(page):
    return (ROOT / "docs" / page).read_text()


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-c", "docs", "-b",
         "html", "-d", str(tmp_path / "trees"), ".", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "docs" / "api.html").is_file()
    start = (tmp_path / "site" / "index.html").read_text()
    assert (tmp_path / "site" / re.search('url=([^"]+)', start)[1]).is_file()


@pytest.mark.parametrize("broken", ["[x](nowhere.md)", "[x](spec.md#nothing)"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path, broken):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "spec.md").write_text("# Spec\n\n## Shares\n")
    (tmp_path / "docs" / "README.md").write_text(f"# Start\n\n[ok](spec.md#shares) {broken}\n")
    settings = (ROOT / "docs" / "conf.py").read_text().split("_CAPTIONS")[0]
    (tmp_path / "docs" / "conf.py").write_text(settings)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-c", "docs", ".", "o"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cross-reference target not found" in done.stderr or "xref_missing" in done.stderr


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^\| \[.*?\]\(([\w-]+\.md)\)", read("README.md"), re.MULTILINE)
    assert sorted(listed) == sorted(
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"
    )


@pytest.mark.parametrize("module", [distorch, integrations], ids=lambda m: m.__name__)
def test_the_reference_has_every_public_name(module):
    listed = re.findall(r"^\.\. auto\w+:: (\w+)", read("api.md"), re.MULTILINE)
    assert set(module.__all__) <= set(listed)
    assert len(listed) == len(set(listed))
    assert set(listed) <= {*distorch.__all__, *integrations.__all__}


FUNCTIONS = {
    name: function
    for module in (distorch, integrations)
    for name in module.__all__
    if inspect.isroutine(function := getattr(module, name))
}
RAISE_NOTHING = {"devices", "fetch_count", "init_empty_weights", "is_sharded"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_names_arguments_and_errors(name):
    function = FUNCTIONS[name]
    text = inspect.getdoc(function)
    names = [n for n in inspect.signature(function).parameters if n not in ("options", "kwargs")]
    if len(names) > 1:  # a single one is what the first line is about
        assert [n for n in names if f"\n    {n}: " not in text] == []
    assert ("\nRaises:\n" in text) == (name not in RAISE_NOTHING)


def test_functions_are_looked_at():
    assert {"distribute", "load", "trace", "load_pipeline", "load_pretrained"} <= FUNCTIONS.keys()


# Of tests, which CONTRIBUTING and the page about GPUs name.
OF_TESTS = {"DISTORCH_REQUIRE_CUDA", "DISTORCH_"}


def test_pages_name_no_variable_that_there_is_not():
    named = set()
    for page in [ROOT / "CONTRIBUTING.md", *PAGES]:
        named |= set(re.findall(r"DISTORCH_[A-Z_]*", page.read_text()))
    listed = set(re.findall(r"^\| `(\w+)`", read("environment.md"), re.MULTILINE))
    assert named - listed <= OF_TESTS


def test_environment_variables():
    """Those of the page are read, and those that are read are on the page."""
    read_ones = set()
    for source in SOURCES:
        text = source.read_text()
        read_ones |= set(
            re.findall(r"(?:environ(?:\.get)?[\[(]|getenv\(|choice\()\s*\"(\w+)\"", text)
        )
    listed = set(re.findall(r"^\| `(\w+)`", read("environment.md"), re.MULTILINE))
    ours = {name for name in read_ones if name.startswith("DISTORCH_")}
    assert len(ours) >= 7
    assert ours <= listed
    assert {name for name in listed if name.startswith("DISTORCH_")} <= ours


def specs_in(text):
    """What stands in the text as a placement."""
    quoted = re.findall(r"[\"`]((?:auto|(?:cuda|cpu|disk)[\w:+]*,[^\"`\n]*))[\"`]", text)
    return [spec for spec in quoted if "..." not in spec]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_spec_of_a_page_can_be_read(page):
    wrong = {}
    for spec in specs_in(page.read_text()):
        try:
            parse_spec(as_simulated(spec))
        except SpecError as error:
            wrong[spec] = str(error)
    # Strings that pages show as wrong, that only the nodes of ComfyUI take, and lists of donors.
    assert set(wrong) <= {"cuda:0,2qb;cpu,*", "cpu,2qb", "cpu,5gb*", "cuda:1,cpu"}, wrong


def test_specs_are_found():
    assert specs_in('"cuda:0,2gb;cpu,*" `cpu,2qb` "auto" `"cuda:0,1gb;disk,*"`') == [
        "cuda:0,2gb;cpu,*", "cpu,2qb", "auto", "cuda:0,1gb;disk,*"
    ]  # fmt: skip


def test_the_pictures_show_what_is():
    """They are what the program draws now; times are those of the simulated accelerator."""
    from distorch.testing import sim

    path = ROOT / "docs" / "pictures" / "draw.py"
    module = importlib.util.spec_from_file_location("draw_pictures", path)
    draw = importlib.util.module_from_spec(module)
    module.loader.exec_module(draw)
    assert draw.step().svg() == path.with_name("step.svg").read_text()
    for order in ("interleaved", "sequential"):
        drawn = draw.plan(order).svg().replace("sim:0", "cuda:0")
        assert drawn == path.with_name(f"{order}.svg").read_text()
    times = []
    for _, spec, prefetch in draw.CASES:
        operators, copies = draw.one_step(spec, prefetch)
        times.append(operators[-1].end)
        assert bool(copies) == ("100%" not in spec)
    resident, waiting, ahead = times
    assert ahead < 1.02 * resident < waiting
    sim.configure(devices=2)
