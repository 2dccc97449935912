"""The CUDA kernels compile for every supported GPU, within their registers.

Their bodies run on the host in csrc/tests.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
GPUS = ["75", "80", "86", "89", "90", "100", "120"]
# Half of a GPU's threads or more at work; a quarter for merges, whose sums are in registers.
MOST_REGISTERS = {"dequantise.cu": 64, "merge.cu": 128}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
    done = subprocess.run(
        ["nvcc", "-std=c++20", "-c", f"-I{CSRC}", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra",
         *targets, str(source), "-o", str(tmp_path / "kernels.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) >= len(GPUS)
    assert max(registers) <= MOST_REGISTERS[source.name]
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(memory) == len(registers)
    assert set(memory) == {("0", "0")}
