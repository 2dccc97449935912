# SPDX-License-Identifier: Apache-2.0
"""What is said when distorch is built, or imported, beside the wrong torch or none."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import setuptools.command.build
import torch

import distorch
from distorch import _library

ROOT = Path(__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MINOR = ".".join(torch.__version__.split(".")[:2])


def run_setup(*commands, before=""):
    """setup.py as pip runs it: the folder with torch is not on the path."""
    program = f"""
import setuptools, setuptools.command.bdist_wheel, sys, subprocess
sys.path = [path for path in sys.path if "site-packages" not in path]
{before}
sys.argv[1:] = {list(commands)}
import setup
print("torch of the build:", setup.TORCH and setup.TORCH.__version__)
"""
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )


NONE = "sys.executable = '/bin/true'"  # a Python that knows no torch


def test_torch_is_found_behind_the_isolation_of_pip():
    done = run_setup("--version")
    assert done.stdout.splitlines()[-1] == f"torch of the build: {torch.__version__}", done.stderr


def test_without_torch_only_building_is_refused(tmp_path):
    done = run_setup("--version", before=NONE)
    assert done.stdout.splitlines()[-2:] == [distorch.__version__, "torch of the build: None"]
    done = run_setup("build_ext", "--build-lib", str(tmp_path), before=NONE)
    assert done.returncode == 1
    assert "there is none in this environment" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_torch_is_refused_by_its_version():
    old = "import types; sys.modules['torch'] = t = types.ModuleType('torch'); t.__version__ = "
    done = run_setup("--version", before=f"{old}'2.6.0+cu124'")
    assert done.returncode == 1
    assert "needs torch 2.11 or newer, and this environment has torch 2.6.0+cu124" in done.stderr


def test_the_library_says_which_torch_it_was_built_for():
    folder = Path(distorch.__file__).parent
    assert _library.problem(folder, torch.__version__) == ""
    assert _library.problem(folder, f"{MINOR}.9+cu130") == ""
    other = _library.problem(folder, "2.99.1+cpu")
    assert other.startswith(f"distorch was built for torch {MINOR}.")
    assert "this is torch 2.99.1+cpu" in other
    assert "--force-reinstall" in other


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["_C.cpython-39-x86_64-linux-gnu.so"], "built for another Python (_C.cpython-39-"),
        (["../setup.py"], "Start it in another folder"),
        ([], "install distorch again"),
    ],
)
def test_a_missing_library_says_why(tmp_path, files, told):
    folder = tmp_path / "distorch"
    folder.mkdir()
    for file in files:
        (folder / file).write_text("")
    problem = _library.problem(folder, torch.__version__)
    assert problem.startswith("distorch's compiled library is not there: ")
    assert told in problem
    (folder / f"_C{SUFFIX}").write_bytes(b"")  # the disk was full
    assert _library.problem(folder, torch.__version__) == problem


def test_a_library_that_does_not_say_is_left_to_the_loader(tmp_path):
    (tmp_path / f"_C{SUFFIX}").write_bytes(b"not a library")
    assert _library.problem(tmp_path, torch.__version__) == ""


def test_import_says_it():
    program = (
        "import torch; torch.__version__ = '2.99.0'\n"
        "try:\n    import distorch\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "and this is torch 2.99.0" in done.stdout


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.syspath_prepend(ROOT)
    yield importlib.import_module("setup")
    del sys.modules["setup"]


@pytest.mark.parametrize(
    ("cuda", "compiler", "label"),
    [(None, None, "cpu"), ("13.0", "/nvcc", "cu130"), ("12.8", "/nvcc", "cu128"),
     ("13.0", None, "cpu")],
)  # fmt: skip
def test_a_wheel_names_its_torch(monkeypatch, setup, cuda, compiler, label):
    fake = types.SimpleNamespace(
        __version__="2.14.1+whatever", version=types.SimpleNamespace(cuda=cuda)
    )
    monkeypatch.setattr(setup, "TORCH", fake)
    monkeypatch.setattr(setup, "nvcc", lambda: compiler)
    assert setup.label() == ""
    monkeypatch.setenv("DISTORCH_WHEEL_LABEL", "1")
    assert setup.label() == f"+torch2.14.{label}"


@pytest.mark.parametrize("label", ["", "+torch2.14.cpu"])
def test_the_label_is_in_the_version(monkeypatch, setup, label):
    monkeypatch.setattr(setup, "label", lambda: label)
    metadata = setup.Labelled(setuptools.Distribution({"name": "x", "version": "1.0"}))
    metadata.tag_build = ""  # as the setup.cfg of a source distribution has it
    metadata.finalize_options()
    assert metadata.egg_version == f"1.0{label}"


def test_after_an_upgrade_of_torch_all_is_built_again(monkeypatch, setup, tmp_path):
    forced = []
    monkeypatch.setattr(setup.BuildExtension, "run", lambda self: forced.append(self.force))
    monkeypatch.setattr(setup, "nvcc", lambda: None)
    for name in ("torch-1", "torch-1", "torch-2"):
        monkeypatch.setattr(setup, "OBJECTS", tmp_path / name)
        build = setup.Build(setuptools.Distribution())
        build.extensions, build.force, build.inplace = [], False, False
        build.build_lib = str(tmp_path / "lib")
        build.run()
        assert build.build_temp == str(tmp_path / name)
    assert forced == [True, False, True]


def test_each_torch_is_compiled_in_a_folder_of_its_own(setup):
    assert setup.OBJECTS.parent == ROOT / "build"
    assert torch.__version__ in setup.OBJECTS.name
    assert sys.implementation.cache_tag in setup.OBJECTS.name


def fake_nvcc(folder, release):
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_kernels_are_built_again_for_other_gpus_and_toolkits(monkeypatch, setup, tmp_path):
    built = []
    target = tmp_path / "_cuda.so"

    def build_kernels(compiler, target):
        built.append((setup.toolkit_release(compiler), setup.chosen_gpus()))
        target.write_text("")

    monkeypatch.setattr(setup, "build_kernels", build_kernels)
    build = setup.Build(setuptools.Distribution())
    for release, gpus in (("12.8", "89"), ("12.8", "89"), ("12.8", "120"), ("13.0", "120")):
        compiler = fake_nvcc(tmp_path, release)
        monkeypatch.setattr(setup, "nvcc", lambda compiler=compiler: compiler)
        monkeypatch.setenv("DISTORCH_GPUS", gpus)
        build.add_kernels(target, tmp_path / "noted" / "kernels.txt")
    assert built == [((12, 8), ["89"]), ((12, 8), ["120"]), ((13, 0), ["120"])]
    monkeypatch.setattr(setup, "nvcc", lambda: None)
    build.add_kernels(target, tmp_path / "noted" / "kernels.txt")
    assert not target.exists()  # it would be loaded


def test_what_an_earlier_build_left_is_not_packed(monkeypatch, setup, tmp_path):
    (tmp_path / "gone.py").write_text("")
    (tmp_path / "_C.so").write_text("")
    monkeypatch.setattr(setuptools.command.build.build, "run", lambda self: None)
    build = setup.Fresh(setuptools.Distribution())
    build.build_lib = tmp_path
    build.run()
    assert [path.name for path in tmp_path.iterdir()] == ["_C.so"]


@pytest.mark.parametrize(
    ("compiler", "told"),
    [("/nowhere/g++", "There is no /nowhere/g++"), ("/bin/false", "is none, or is too old")],
)
def test_a_compiler_that_will_not_do_is_named(setup, compiler, told):
    setup.check_compiler("g++")
    with pytest.raises(SystemExit, match=r"needs a C\+\+20 compiler.*" + re.escape(told)):
        setup.check_compiler(compiler)


def test_other_systems_are_refused_before_a_build(monkeypatch, setup):
    setup.check_system()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="runs on Linux only, and this is win32"):
        setup.check_system()


@pytest.mark.parametrize(("release", "refused"), [("11.8", True), ("12.0", False), ("13.1", False)])
def test_an_old_toolkit_is_refused(setup, tmp_path, release, refused):
    told = pytest.raises(SystemExit, match="need the CUDA Toolkit 12 or newer, and .*of 11.8")
    with told if refused else contextlib.nullcontext():
        setup.check_toolkit(fake_nvcc(tmp_path, release))


MISSING = """
import importlib.util, sys
class Missing:
    def find_spec(self, name, path, target=None):
        if name == "{0}":
            raise ModuleNotFoundError("No module named '{0}'", name=name)
sys.meta_path.insert(0, Missing())
spec = importlib.util.spec_from_file_location("pack", "comfyui-distorch/__init__.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@pytest.mark.parametrize(
    ("missing", "told"),
    [("distorch", f"{sys.executable} -m pip install ."), ("nodes", "No module named 'nodes'")],
)
def test_the_nodes_say_how_to_install_distorch(missing, told):
    """ComfyUI shows what the import of a folder in custom_nodes raises."""
    done = subprocess.run(
        [sys.executable, "-c", MISSING.format(missing)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "comfy" / "stub")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert told in done.stderr.splitlines()[-1]
