"""The hot loops of the CPU kernels are vector instructions on every instruction set, by the compiler's own report."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("*_kernel.cpp"))
PARTS = [*KERNELS, *(ROOT / "csrc" / "cpu").glob("*.h")]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"],
}


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_loops_marked_as_vector_loops_are_vectorized(instruction_set: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if (
        compiler is None
        or "Free Software Foundation"
        not in subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    ):
        pytest.skip("only g++ reports what it vectorized in this form")
    target = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    if instruction_set != "baseline" and not target.startswith("x86_64"):
        pytest.skip(f"{instruction_set} is of x86-64, this machine is {target.strip()}")

    marked = {
        (part.name, number)
        for part in PARTS
        for number, line in enumerate(part.read_text().splitlines(), 1)
        if line.endswith("// vector loop")
    }
    assert len(marked) >= 10, "the marks of the vector loops are gone"
    # The flags of CMakeLists.txt.
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    report = ""
    for kernel in KERNELS:
        command = [compiler, *flags, *INSTRUCTION_SETS[instruction_set], "-fopt-info-vec-optimized"]
        command += [f"-I{ROOT / 'csrc'}", "-c", str(kernel), "-o", str(tmp_path / "kernel.o")]
        report += subprocess.run(command, capture_output=True, text=True, check=True).stderr
    vectorized = {
        (name, int(line)) for name, line in re.findall(r"(\w+\.\w+):(\d+):\d+: optimized: loop vectorized", report)
    }
    missing = sorted(marked - vectorized)
    assert not missing, f"not vectorized for {instruction_set}: {missing}\n{report}"
