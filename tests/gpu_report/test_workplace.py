# SPDX-License-Identifier: Apache-2.0
"""Where items run: the tree, or a copy of it with a kit's binaries."""

import json
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.gpu.report import workplace

ABI = sysconfig.get_config_var("SOABI")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    for name in ("distorch/testing", "tests/gpu", "csrc", "distorch/__pycache__"):
        (root / name).mkdir(parents=True)
    for name in ("distorch/__init__.py", "distorch/_cuda.so", "setup.py", "secret.txt"):
        (root / name).write_text("old")
    return root


@pytest.fixture
def kit(tmp_path):
    folder = tmp_path / "kit"
    for name in (f"distorch/_C.{ABI}.so", "distorch/_cuda.so", f"distorch/testing/_sim.{ABI}.so"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("new")
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / "pure-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pure_of_the_kit/__init__.py", "value = 1")
    with zipfile.ZipFile(folder / "wheels" / "tqdm-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tqdm/__init__.py", "older = True")
        wheel.writestr("tqdm-1.dist-info/METADATA", "")
    (folder / "kit.json").write_text(json.dumps({"abi": ABI, "torch": "0.1", "commit": "abc"}))
    return folder


def test_a_kit_that_fits(tree, kit, tmp_path):
    place = workplace.prepared(kit, tmp_path / "scratch", tree)
    found = {
        str(path.relative_to(place.folder)) for path in place.folder.rglob("*") if path.is_file()
    }
    assert found == {
        "distorch/__init__.py", "distorch/_cuda.so", "setup.py", f"distorch/_C.{ABI}.so",
        f"distorch/testing/_sim.{ABI}.so",
    }  # fmt: skip
    assert (place.folder / "distorch/_cuda.so").read_text() == "new"
    assert place.built()
    assert (place.site / "pure_of_the_kit" / "__init__.py").exists()
    assert place.environment()["PYTHONPATH"].split(":")[:2] == [str(place.folder), str(place.site)]
    assert "built for torch 0.1" in " ".join(place.notes)
    # What this Python has itself stays what it was.
    assert not (place.site / "tqdm").exists()
    assert "3 libraries and 1 of 2 packages (pure; 1 are here already)" in place.notes[0]


def test_a_wheel_that_is_broken(tree, kit, tmp_path):
    (kit / "wheels" / "pure-1-py3-none-any.whl").write_text("half")
    with pytest.raises(ValueError, match="pure-1-py3-none-any.whl: File is not a zip file"):
        workplace.prepared(kit, tmp_path / "scratch", tree)


def test_a_kit_for_another_python(tree, kit, tmp_path):
    (kit / "kit.json").write_text(json.dumps({"abi": "cpython-27", "torch": "0.1"}))
    place = workplace.prepared(kit, tmp_path / "scratch", tree)
    assert not place.built()
    assert place.folder != tree  # nothing is built in an owner's tree
    assert "it is for cpython-27" in place.notes[0]


def test_a_tree_that_is_built(tree, tmp_path):
    (tree / "distorch" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("")
    assert workplace.prepared(None, tmp_path / "scratch", tree).folder == tree


def test_no_kit(tmp_path):
    (tmp_path / "kit.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object with 'abi'"):
        workplace.read_kit(tmp_path)


def test_the_report_imports_neither_torch_nor_distorch():
    program = (
        "import sys; import tests.gpu.report.__main__;"
        "print([name for name in ('torch', 'distorch', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=workplace.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
