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
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mg_ops.triton import mutual_match  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

KERNELS = ("claim", "settle", "own", "rank")
FLAGS = ("DECODE", "REGRESSED", "AMPLIFIED", "CROWD")
CHIPS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    **dict.fromkeys(("keys", "best", "list_starts", "cls_match", "loc_match"), "*i64"),
    **dict.fromkeys(("counters", "list_entries", "images_to_redo", "num_pos", "num_total"), "*i32"),
    "gt_crowd": "*u8",
}
NUMBERS = {**dict.fromkeys(("sigma", "iou_positive", "iou_ignored", "crowd_overlap"), "fp32"), "coder": ("fp32",) * 5}


def compile_kernel(kernel: str, chip: str, flags: dict[str, bool], floating: str = "fp32", integer: str = "i64") -> Any:
    """A kernel as `mg_ops.triton.mutual_match` launches it, for inputs of these types."""
    function = getattr(mutual_match, f"{kernel}_kernel")
    flags = {"PROBABILITIES": False, **flags}
    constants = {name: value for name, value in flags.items() if name in function.arg_names}
    constants["BLOCK"] = getattr(mutual_match, f"{kernel.upper()}_BLOCK")
    signature: dict[str, Any] = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        elif name in ("anchors", "pred_boxes", "cls_scores", "gt_boxes"):
            signature[name] = f"*{floating}"
        elif name in ("gt_labels", "gt_offsets"):
            signature[name] = f"*{integer}"
        elif name in NUMBERS:
            signature[name] = NUMBERS[name]
        else:
            signature[name] = "i64" if name.startswith("stride_") else "i32"
    options = {"num_warps": getattr(mutual_match, f"{kernel.upper()}_WARPS"), "enable_fp_fusion": False}
    source = ASTSource(function, signature, constexprs=constants)
    return triton.compile(source, target=CHIPS[chip], options=options)


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


def spilled_bytes(compiled: Any, tmp_path: Path) -> int:
    """Bytes of registers that do not fit, from ptxas."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return sum(map(int, re.findall(r"LOCAL:(\d+)", usage)))


def all_flags(kernel: str) -> list[dict[str, bool]]:
    names = [name for name in FLAGS if name in getattr(mutual_match, f"{kernel}_kernel").arg_names]
    return [dict(zip(names, values, strict=True)) for values in itertools.product((False, True), repeat=len(names))]


ALL_ON = dict.fromkeys(FLAGS, True)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_exact_and_fit_their_registers(kernel: str, chip: str, tmp_path: Path) -> None:
    compiled = compile_kernel(kernel, chip, ALL_ON)
    assert_exact(compiled, chip)
    if chip.startswith("sm_"):
        assert spilled_bytes(compiled, tmp_path) == 0
    else:
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]) == ["0"]


def test_divisions_are_there_to_be_exact() -> None:
    """The check above looks at the right thing: claiming divides and multiplies."""
    ptx = compile_kernel("claim", "sm_90", ALL_ON).asm["ptx"]
    assert "div.rn.f32" in ptx and "mul.rn.f32" in ptx and "add.rn.f32" in ptx
    assert "red.global.gpu.relaxed.max.s64" in ptx or "atom.global.gpu.relaxed.max.s64" in ptx


@pytest.mark.parametrize("floating", ["fp16", "bf16", "fp64"])
@pytest.mark.parametrize("kernel", ["claim", "own"])
def test_every_dtype_compiles(kernel: str, floating: str) -> None:
    compiled = compile_kernel(kernel, "sm_90", ALL_ON, floating, integer="i32")
    assert_exact(compiled, "sm_90")


def test_probabilities_compile() -> None:
    compiled = compile_kernel("claim", "sm_90", {**ALL_ON, "PROBABILITIES": True})
    assert_exact(compiled, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_variant_compiles(kernel: str, chip: str, tmp_path: Path) -> None:
    for flags in all_flags(kernel):
        compiled = compile_kernel(kernel, chip, flags)
        assert_exact(compiled, chip)
        assert spilled_bytes(compiled, tmp_path) == 0, flags


def test_importing_mg_ops_does_not_import_triton() -> None:
    """Nor the compiler of torch: both take longer than the rest together."""
    code = "import sys, mg_ops; mg_ops.backends(); sys.exit(bool({'triton', 'torch._dynamo'} & set(sys.modules)))"
    root = Path(mutual_match.__file__).parents[2]
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, check=False).returncode == 0
