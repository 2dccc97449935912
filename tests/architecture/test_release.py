# SPDX-License-Identifier: Apache-2.0
"""What is published: licence lines, versions, links, the workflows that build and release."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import distorch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".js", ".yml"}
REPOSITORY = "https://github.com/someone/distorch"
TAG = f"v{distorch.__version__}"


@pytest.fixture(scope="module")
def release():
    """.github/prepare_release.py as a module."""
    file = ROOT / ".github" / "prepare_release.py"
    spec = importlib.util.spec_from_file_location("prepare_release", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """What the script reads, with a version that has its date."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "examples", "comfyui-distorch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "distorch").mkdir()
    shutil.copy(ROOT / "distorch" / "__init__.py", tmp_path / "distorch")
    for page in (*tmp_path.glob("*.md"), *tmp_path.glob("docs/*.md")):
        text = page.read_text().replace(" - not released", " - 2026-12-24")
        page.write_text(re.sub(r"(?:not|neither) on PyPI", "on PyPI", text))
    return tmp_path


def tracked():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout: a source distribution has no list of its files")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_every_source_names_its_licence():
    sources = [path for path in tracked() if path.suffix in SOURCES or path.name == "Makefile"]
    assert len(sources) > 500
    line = "SPDX-License-Identifier: Apache-2.0"
    heads = {path: path.read_text().splitlines()[:2] for path in sources if path.exists()}
    assert [path for path, head in heads.items() if line not in "".join(head)] == []


def test_the_version_is_the_same_everywhere(release):
    assert release.check_version(ROOT, TAG) == distorch.__version__
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].split()[0]
    assert newest == distorch.__version__


def test_links_work_everywhere(release, checkout):
    notes = release.prepare(checkout, TAG, REPOSITORY)
    assert notes.startswith("The first version.")
    assert f"]({REPOSITORY}/blob/{TAG}/docs/gpu.md)" in notes
    text = (checkout / "README.md").read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) == (ROOT / "README.md").read_text().count("](") > 10
    assert not [t for t in targets if not t.startswith(("https://", "#"))]
    raw = f"https://raw.githubusercontent.com/someone/distorch/{TAG}/docs/digits.png"
    assert f"]({raw})" in text
    assert f"]({REPOSITORY}/blob/{TAG}/docs/install.md)" in text
    assert f"]({REPOSITORY}/blob/{TAG}/docs/README.md)" in text


def test_addresses_are_in_the_metadata(release, checkout):
    release.prepare(checkout, TAG, REPOSITORY)
    before = tomllib.loads((ROOT / "pyproject.toml").read_text())
    after = tomllib.loads((checkout / "pyproject.toml").read_text())
    assert after["project"].pop("urls") == {
        "Homepage": REPOSITORY,
        "Documentation": f"{REPOSITORY}/blob/{TAG}/docs/README.md",
        "Changelog": f"{REPOSITORY}/blob/{TAG}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    }
    assert after == before
    nodes = tomllib.loads((checkout / "comfyui-distorch" / "pyproject.toml").read_text())
    assert nodes["project"]["urls"] == {"Repository": REPOSITORY}
    assert nodes["tool"]["comfy"]["DisplayName"] == "distorch"


@pytest.mark.parametrize(
    ("tag", "repository", "edit", "told"),
    [
        ("v9.9", REPOSITORY, None, "and the tag is v9.9"),
        (TAG, "someone/distorch", None, "expected an address like https://github.com/me/distorch"),
        (TAG, REPOSITORY, ("CHANGELOG.md", "2026-12-24", "not released"), "expected 0.1.0 - YYYY"),
        (TAG, REPOSITORY, ("CHANGELOG.md", "## 0.1.0", "## 0.0.9"), "has no part '## 0.1.0"),
        (TAG, REPOSITORY, ("README.md", "docs/spec.md", "docs/gone.md"), "links to docs/gone.md"),
        (TAG, REPOSITORY, ("docs/install.md", "on PyPI", "not on PyPI"), "install.md: they still"),
        (TAG, REPOSITORY, ("comfyui-distorch/pyproject.toml", '"0.1.0"', '"0.2.0"'), "has version"),
    ],
)
def test_what_does_not_fit_is_not_released(release, checkout, tag, repository, edit, told):
    if edit is not None:
        file, old, new = edit
        text = (checkout / file).read_text()
        assert old in text
        (checkout / file).write_text(text.replace(old, new))
    before = {path: path.read_text() for path in checkout.rglob("*.toml")}
    with pytest.raises(SystemExit, match=re.escape(told)):
        release.prepare(checkout, tag, repository)
    assert {path: path.read_text() for path in before} == before


def test_a_checkout_is_prepared_once(release, checkout):
    release.prepare(checkout, TAG, REPOSITORY)
    with pytest.raises(SystemExit, match="expected a fresh checkout"):
        release.prepare(checkout, TAG, REPOSITORY)


def test_workflows_are_well_formed():
    tool = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [str(tool), "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def _commands(workflow):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"].values()
    return "\n".join(step.get("run", "") for job in jobs for step in job["steps"])


def test_every_pull_request_runs_the_short_form_of_each_nightly_job():
    def found(workflow):
        return set(re.findall(r"^make ([a-z-]+)", _commands(workflow), re.M))

    assert len(found("nightly.yml")) >= 4
    assert {"test" if name == "test-all" else name for name in found("nightly.yml")} <= found(
        "ci.yml"
    )


def test_workflows_call_what_there_is():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = "\n".join(_commands(path.name) for path in WORKFLOWS)
    called = set(re.findall(r"^make ([a-z-]+)", commands, re.M))
    assert {"lint", "test", "test-all", "docs", "wheel"} <= called <= targets
    programs = re.findall(r"(\S+\.py)\b", commands)
    assert programs and all((ROOT / program).is_file() for program in programs)


def test_wheels_are_made_for_every_torch_that_is_supported():
    first, last = re.search(
        r"PyTorch 2\.(\d+) to 2\.(\d+)", (ROOT / "README.md").read_text()
    ).groups()
    supported = {f"2.{minor}" for minor in range(int(first), int(last) + 1)}
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    made = release["jobs"]["wheels"]["strategy"]["matrix"]["torch"]
    assert {version.rpartition(".")[0] for version in made} == supported
    checks = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = {*checks["jobs"]["torch"]["strategy"]["matrix"]["torch"],
              checks["env"]["TORCH_SPEC"].partition("==")[2].partition("+")[0]}  # fmt: skip
    assert {version.rpartition(".")[0] for version in tested} == supported
