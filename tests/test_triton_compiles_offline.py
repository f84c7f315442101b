"""Every variant of the Triton kernels compiles for NVIDIA and AMD GPUs, with exact arithmetic; no GPU is needed.

The interpreter of test_triton_interpreted.py accepts code that the compiler rejects, and rounds nothing together: what
the compiler makes of the kernels is looked at here, in the assembly.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton_counts import CHIPS, KERNELS, compile_kernel, resources  # noqa: E402

from mg_ops.triton import mutual_match  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

STRATEGIES = list(itertools.product((False, True), repeat=2))
"""Classification by q_regressed, localization by q_amplified."""


def assert_exact(compiled: Any, chip: str) -> None:
    """No contraction, no flushing of subnormals, no approximate division or function."""
    if chip.startswith("sm_"):
        ptx = compiled.asm["ptx"]
        instructions = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*)\s", ptx, re.MULTILINE))
        floating = {name for name in instructions if re.search(r"\.f(16|32|64)", name)}
        rounded = {name for name in floating if name.startswith(("add", "sub", "mul", "div", "fma", "mad"))}
        # Without .rn ptxas would be free to fuse a product and a sum.
        assert rounded <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, rounded
        assert not {name for name in floating if re.search("ftz|approx|fma|mad", name)}, floating
    else:
        assembly = compiled.asm["amdgcn"]
        assert set(re.findall(r"\.amdhsa_float_denorm_mode_32 (\d)", assembly)) == {"3"}  # keeps subnormals
        divisions = len(re.findall(r"v_div_fixup_f32", assembly))
        # An IEEE division is five fused steps and v_div_fmas; nothing else is fused.
        assert len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)\w*_f32", assembly)) <= 6 * divisions
        assert not re.findall(r"\bv_(?:exp|log)_f32", assembly)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_exact_and_fit_their_registers(kernel: str, chip: str) -> None:
    compiled = compile_kernel(kernel, chip)
    assert_exact(compiled, chip)
    if chip.startswith("sm_"):
        assert resources(compiled).spilled == 0
    else:
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]) == ["0"]


def test_divisions_are_there_to_be_exact() -> None:
    """The check above looks at the right thing: claiming divides and multiplies."""
    ptx = compile_kernel("claim", "sm_90").asm["ptx"]
    assert "div.rn.f32" in ptx and "mul.rn.f32" in ptx and "add.rn.f32" in ptx
    assert "red.global.gpu.relaxed.max.s64" in ptx or "atom.global.gpu.relaxed.max.s64" in ptx


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_loads_are_as_wide_as_they_can_be(chip: str) -> None:
    """A row of four numbers is one load; maxima are read from the L2 cache, not from the other end of the system."""
    loads = Counter(re.findall(r"ld\.[\w.:]*global[\w.:]*", compile_kernel("claim", chip).asm["ptx"]))
    a_lane = mutual_match.CLAIM_BLOCK // 32  # anchors
    assert loads["ld.global.v4.b32"] == 2 * a_lane  # anchors, and predicted boxes of float32
    assert loads["ld.global.v2.b32"] == 2 * a_lane  # float16 and bfloat16
    assert loads["ld.global.b16"] == (2 * 4 + 2) * a_lane  # those with other strides, number by number, and scores
    assert loads["ld.global.cg.b64"] == 1 and not [load for load in loads if "volatile" in load]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_compiles_once_a_strategy(kernel: str) -> None:
    """Triton compiles anew for each type and value of an argument that it may specialize a kernel for."""
    for parameter in getattr(mutual_match, f"{kernel}_kernel").params:
        if not parameter.is_constexpr:
            integer = parameter.annotation_type in ("i32", "i64")
            assert parameter.annotation_type == "fp32" or (integer and parameter.do_not_specialize), parameter.name


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_variant_compiles(kernel: str, chip: str) -> None:
    for strategy in STRATEGIES:
        compiled = compile_kernel(kernel, chip, strategy)
        assert_exact(compiled, chip)
        assert resources(compiled).spilled == 0, strategy


def test_importing_mg_ops_does_not_import_triton() -> None:
    """Nor the compiler of torch: both take longer than the rest together."""
    code = "import sys, mg_ops; mg_ops.backends(); sys.exit(bool({'triton', 'torch._dynamo'} & set(sys.modules)))"
    root = Path(mutual_match.__file__).parents[2]
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, check=False).returncode == 0
