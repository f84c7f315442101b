"""The hot loops of the CPU kernels are vector instructions on every instruction set, by the compiler's own report."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU = ROOT / "csrc" / "cpu"
KERNELS = {
    CPU / "mutual_match_kernel.cpp": ("tile.h", "image_work.h", "claim.h", "select.h"),
    CPU / "max_iou_match_kernel.cpp": (),
}
"""Source -> the parts of it whose loops are asked about beside its own."""
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"],
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.name)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_loops_marked_as_vector_loops_are_vectorized(kernel: Path, instruction_set: str, tmp_path: Path) -> None:
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
        for part in (kernel, *(CPU / name for name in KERNELS[kernel]))
        for number, line in enumerate(part.read_text().splitlines(), 1)
        if line.endswith("// vector loop")
    }
    assert len(marked) >= (10 if KERNELS[kernel] else 1), "the marks of the vector loops are gone"
    # The flags of CMakeLists.txt.
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    report = subprocess.run(
        [
            compiler,
            *flags,
            *INSTRUCTION_SETS[instruction_set],
            "-fopt-info-vec-optimized",
            f"-I{ROOT / 'csrc'}",
            "-c",
            str(kernel),
            "-o",
            str(tmp_path / "kernel.o"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    vectorized = {
        (name, int(line)) for name, line in re.findall(r"(\w+\.\w+):(\d+):\d+: optimized: loop vectorized", report)
    }
    missing = sorted(marked - vectorized)
    assert not missing, f"not vectorized for {instruction_set}: {missing}\n{report}"
