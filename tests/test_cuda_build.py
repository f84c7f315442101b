"""The CUDA code in the library is what the kernels promise: registered, exact, without spills, with wide loads."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mg_ops

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "mg_ops" / "libmg_ops.so"
KERNELS = {"prepare_kernel": 32, "object_kernel": 32, "claim_kernel": 32, "rank_kernel": 20}
"""How many warps of each a multiprocessor must find registers for."""


def has_cuda_kernels() -> bool:
    return mg_ops.backends()["cpp"].usable and torch._C._dispatch_has_kernel_for_dispatch_key(
        "mg_ops::mutual_match", "CUDA"
    )


pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="mg_ops/libmg_ops.so is not built: run `make build`")
with_cuda_kernels = pytest.mark.skipif(not has_cuda_kernels(), reason="the library was built without CUDA")


def find_tool(name: str) -> str:
    """A CUDA binary tool: the one that comes with the triton package, or of the CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (tool := Path(folder) / "backends/nvidia/bin" / name).exists():
            return str(tool)
    tool_on_path = shutil.which(name)
    if tool_on_path is None:
        pytest.skip(f"{name} comes with the triton package and with the CUDA toolkit; neither is here")
    return tool_on_path


def dump(*options: str) -> str:
    command = [find_tool("cuobjdump"), *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def instructions() -> list[str]:
    """The floating-point instructions of the kernels' PTX: what ptxas may and may not rewrite is said there."""
    modules = [
        module for module in dump("--dump-ptx").split("Fatbin ptx code") if all(name in module for name in KERNELS)
    ]
    assert len(modules) == 1
    found: list[str] = re.findall(
        r"^\s*(?:@!?%p\d+\s+)?([a-z0-9]+\.[a-z0-9.]*f(?:32|64)[a-z0-9.]*)\s", modules[0], re.MULTILINE
    )
    assert len(found) > 300
    return found


def test_the_operator_has_a_cuda_kernel_where_nvcc_is() -> None:
    """A build that silently left CUDA out would skip the rest of this file."""
    cache = ROOT / "build" / "library" / "CMakeCache.txt"
    if not cache.exists() or not re.search(r"^CMAKE_CUDA_COMPILER:\w+=/", cache.read_text(), re.MULTILINE):
        pytest.skip("the library was built where no nvcc is")
    if re.search(r"^MG_OPS_CUDA:\w+=OFF", cache.read_text(), re.MULTILINE):
        pytest.skip("the library was built with MG_OPS_CUDA=OFF")
    assert has_cuda_kernels()


@with_cuda_kernels
def test_no_kernel_spills() -> None:
    """No registers in local memory, and shared memory within the 48 KiB every GPU gives a block."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump("--dump-resource-usage")
    )
    seen = dict.fromkeys(KERNELS, 0)
    for function, registers, stack, shared, local in usage:
        for name, warps in KERNELS.items():
            if name in function:
                seen[name] += 1
                assert (int(stack), int(local)) == (0, 0), f"{function} spills"
                assert int(registers) * 32 * warps <= 65536, f"{function} leaves room for fewer than {warps} warps"
                assert int(shared) <= 48 * 1024
    architectures = len(set(re.findall(r"arch = (sm_\d+a?)", dump("--dump-resource-usage"))))
    assert architectures >= 1
    assert all(count >= architectures for count in seen.values()), seen  # other rules have kernels of these names


@with_cuda_kernels
def test_arithmetic_is_rounded_after_every_operation(instructions: list[str]) -> None:
    """A multiply or add without `.rn` may be fused by ptxas, and a fused one is rounded once."""
    kinds = {instruction.split(".")[0] for instruction in instructions}
    assert {"add", "mul", "sub", "div"} <= kinds
    assert not kinds & {"fma", "mad"}, "fused multiply-add"
    inexact = [
        name for name in instructions if name.split(".")[0] in ("add", "sub", "mul", "div") and ".rn" not in name
    ]
    assert inexact == []


@with_cuda_kernels
def test_division_is_ieee_and_subnormals_are_kept(instructions: list[str]) -> None:
    assert "div.rn.f32" in instructions
    assert not [name for name in instructions if "approx" in name or "full" in name or "ftz" in name]


@with_cuda_kernels
def test_boxes_are_loaded_sixteen_bytes_at_a_time() -> None:
    sass = dump("--dump-sass", "--function", "_ZN6mg_ops4cuda12claim_kernelENS0_15LaunchedProblemE")
    assert "claim_kernel" in sass
    assert re.search(r"LDG\.E\.128", sass)
