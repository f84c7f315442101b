"""The machine code that nvcc makes of the kernels gives the reference's integers, in whatever order warps run.

It is executed without a GPU by tests/machine_code, which also counts what it does. MG_OPS_FUZZ scales the number of
random batches.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import machine_code
import pytest
from cases import CASES
from comparison import assert_same
from conftest import fuzz_cases
from detector_batches import detector_batch
from random_batches import random_batch

import mg_ops

pytestmark = pytest.mark.skipif(
    bool(machine_code.missing_tools()), reason=f"not here: {', '.join(machine_code.missing_tools())}"
)


NVCC = "release 13.0"
"""Another one may use instructions that the interpreter does not know."""


@pytest.fixture(scope="module")
def interpreter() -> machine_code.Interpreter:
    try:
        return machine_code.build()
    except RuntimeError as error:
        if NVCC in subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout:
            raise
        pytest.skip(f"made for nvcc of {NVCC}: {error}")


def test_named_cases(interpreter: machine_code.Interpreter) -> None:
    for seed, case in enumerate(CASES):
        match = interpreter.mutual_match(**case.arguments(packed=True, slack=2), seed=seed)
        assert_same(match, case.expected(slack=2), f"{case.name}: {case.clause}")


def test_random_batches(interpreter: machine_code.Interpreter) -> None:
    for seed in range(fuzz_cases(8)):
        batch = random_batch(seed)
        match = interpreter.mutual_match(**batch.arguments, seed=seed)
        assert_same(match, mg_ops.mutual_match(**batch.arguments, backend="eager"), batch)


def test_counts_of_a_batch(interpreter: machine_code.Interpreter) -> None:
    arguments = detector_batch(2, 1000, 6)
    match = interpreter.mutual_match(**arguments)
    assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), "")
    counts = interpreter.counts()
    assert list(counts) == list(machine_code.KERNELS)
    # Labels: two int64 of each of 2,000 anchors.
    assert counts["claim_kernel"].sectors_written >= 2000 * 16 / 32
    for name, of_launch in counts.items():
        assert of_launch.warps <= of_launch.instructions <= of_launch.warps * of_launch.longest_warp, name
        lines = interpreter.issued(name).splitlines()
        assert sum(int(line.split()[0]) for line in lines) == of_launch.instructions
    assert counts["claim_kernel"].blocks == 2 * math.ceil(1000 / 64 / 8)


def test_the_command_prints_a_table(interpreter: machine_code.Interpreter) -> None:
    command = [sys.executable, str(Path(machine_code.__file__).parent), "coco320", "--images", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line for line in printed if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| prepare", "| object", "| claim", "| rank", "| all"]
    assert len({row.count(" | ") for row in rows}) == 1


def test_an_unknown_instruction_is_named(interpreter: machine_code.Interpreter) -> None:
    """The last test: the interpreter forgets the kernels."""
    line = "        /*{:04x}*/                   {} ;  /* 0x0000000000000000 */\n        /* 0x0000000000000000 */\n"
    known = "Function : claim_kernel\n" + line.format(0, "IADD3 R1, P0, -R2, c[0x0][0x210], RZ")
    interpreter.load(known)
    for wrong in ("FROB.U32 R1, R2", "IADD3.ODD R1, R2, R3, RZ", "IADD3 R1, R2, Q3, RZ"):
        with pytest.raises(RuntimeError, match="unknown") as error:
            interpreter.load(known + line.format(16, wrong))
        assert "\n" not in str(error.value)
