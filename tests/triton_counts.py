"""What can be counted of the Triton backend without a GPU: registers, instructions, and what a launch costs.

    PYTHONPATH=.:tests python tests/triton_counts.py registers
    PYTHONPATH=.:tests python tests/triton_counts.py launch

Triton compiles for a GPU that is not here; `launch` runs a whole call, with a driver that launches nothing.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from mg_ops.triton import losses, mutual_match

KERNELS = ("claim", "settle", "own", "rank")
CHIPS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_kernel(kernel: str, chip: str, strategy: tuple[bool, bool] = (True, True)) -> Any:
    """A kernel as `mg_ops.triton.mutual_match` launches it: the one compilation for a strategy."""
    function = getattr(mutual_match, f"{kernel}_kernel")
    constants = dict(zip(("REGRESSED", "AMPLIFIED"), strategy, strict=True))
    constants["BLOCK"] = getattr(mutual_match, f"{kernel.upper()}_BLOCK")
    types = {parameter.name: parameter.annotation_type or "constexpr" for parameter in function.params}
    assert {name for name, type_ in types.items() if type_ == "constexpr"} == set(constants)
    options = {"num_warps": getattr(mutual_match, f"{kernel.upper()}_WARPS"), "enable_fp_fusion": False}
    if kernel == "claim" and chip.startswith("sm_"):
        options |= mutual_match.CLAIM_OPTIONS
    return triton.compile(ASTSource(function, types, constexprs=constants), target=CHIPS[chip], options=options)


def compile_loss(
    kernel: Any, chip: str, dtype: str, options: dict[str, Any], sizes: dict[str, Any] | None = None
) -> Any:
    """A kernel of a loss as `mg_ops.triton.losses` launches it.

    Args:
        dtype: of the predictions, as Triton writes it.
        options: its compile-time constants.
        sizes: the types or values of other arguments than those of their annotations, as torch.compile has them.
    """
    constants = options | {name: size for name, size in (sizes or {}).items() if not isinstance(size, str)}
    types = {"class_targets": "*i64", "match": "*i64", "gt_offsets": "*i64"}
    types |= {
        "logits": f"*{dtype}",
        "predictions": f"*{dtype}",
        "result": f"*{dtype}" if options["GRADIENT"] else "*fp32",
    }
    types |= (sizes or {}) | dict.fromkeys(constants, "constexpr")
    names = [parameter.name for parameter in kernel.params]
    signature = {p.name: types.get(p.name, p.annotation_type or "*fp32") for p in kernel.params}
    # Torch's memory is aligned, and most batches hold a multiple of 16 logits.
    aligned = [names.index(name) for name in ("logits", "result", "total") if name in names and name not in constants]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=CHIPS[chip], options={"num_warps": losses.WARPS})


def resources(compiled: Any) -> SimpleNamespace:
    """Of a kernel for an NVIDIA GPU: registers, bytes of those that do not fit (spilled), machine instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, listing = (
            subprocess.run([tools / tool, option, cubin.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "--print-code"))
        )
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!.*\bNOP\b)", listing, re.MULTILINE)
    # Registers that do not fit are in the stack frame.
    return SimpleNamespace(
        registers=numbers["REG"], spilled=numbers["STACK"] + numbers["LOCAL"], instructions=len(instructions)
    )


def warps_on_a_multiprocessor(registers: int, warps_a_program: int) -> int:
    """How many fit by their registers (65,536, given out to warps by 256) and by the 32 programs at a time."""
    fit = 65536 // (-(-registers // 8) * 256)
    return min(fit // warps_a_program, 32) * warps_a_program


def print_registers() -> None:
    """A row a chip and kernel, for strategy "mutual"."""
    for chip in ("sm_80", "sm_90"):
        for kernel in KERNELS:
            found = resources(compile_kernel(kernel, chip))
            warps = warps_on_a_multiprocessor(found.registers, getattr(mutual_match, f"{kernel.upper()}_WARPS"))
            print(
                f"{chip} {kernel}: {found.registers} registers, {found.spilled} bytes spilled, {warps} warps on a "
                f"multiprocessor, {found.instructions} machine instructions"
            )


class NoDriver:
    """In place of Triton's driver: compiles for a GPU that is not here, and launches nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: CHIPS["sm_90"])
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)


def print_launch_cost() -> None:
    """CPU time of a call of the operator's function, in microseconds, and of its four launches in it."""
    triton.runtime.driver.set_active(NoDriver())
    boxes = torch.rand(64, 4)
    offsets, labels = torch.tensor([0, 2, 5]), torch.zeros(5, dtype=torch.int64)
    predictions = boxes.expand(2, 64, 4), torch.zeros(2, 64, 8)
    options = False, True, True, 2.0, 0.5, 0.4, 0.5
    arguments = boxes, *predictions, boxes[:5], labels, offsets, None, [10.0, 10.0, 5.0, 5.0, 4.135], *options

    def measure() -> str:
        mutual_match.mutual_match(*arguments)
        times = []
        for _ in range(25):
            start = time.process_time_ns()
            for _ in range(200):
                mutual_match.mutual_match(*arguments)
            times.append((time.process_time_ns() - start) / 200e3)
        return f"{min(times):.1f} least, {statistics.median(times):.1f} median of 25 times 200 calls"

    print(f"a call: {measure()}")
    no_launch = type("NoLaunch", (), {"__getitem__": lambda self, grid: lambda *arguments, **options: None})()
    for kernel in KERNELS:
        setattr(mutual_match, f"{kernel}_kernel", no_launch)
    print(f"without launches: {measure()}")


if __name__ == "__main__":
    {"registers": print_registers, "launch": print_launch_cost}[sys.argv[1]]()
