"""The CUDA kernels of mutual matching run as the machine code that nvcc makes of them, without a GPU, and counted.

    interpreter = machine_code.build()
    match = interpreter.mutual_match(anchors, gt_boxes, gt_labels, cls_logits=..., pred_boxes=..., seed=7)
    interpreter.counts()

machine.h says what is modelled and what a seed varies. By itself,

    python tests/machine_code coco320 --images 32

prints the counts of a benchmark batch as a table. Needs nvcc, g++, and cuobjdump, which comes with the triton package.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import cuda_on_cpu

HERE = Path(__file__).parent
KERNELS = ("prepare_kernel", "object_kernel", "claim_kernel", "rank_kernel")
PARAMETERS = 0x210
"""Where they begin in a kernel's constants."""
SHARED_BEGIN = 0x400
"""How much of a kernel's shared memory, as the tools give it, is the system's."""


class Counts(ctypes.Structure):
    """Of one launch, as in machine.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("kernel", "blocks", "warps", "instructions", "longest_warp", "cycles", "longest_block"),
            *("sectors_read", "sectors_written", "dram_sectors", "global_atomics", "worst_global_atomic"),
            *("shared_atomics", "worst_shared_atomic", "barriers", "slow_divisions", "registers", "resident_warps"),
        )
    )


def find_tool(name: str) -> str | None:
    """A CUDA binary tool: the one that comes with the triton package, or of the CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (tool := Path(folder) / "backends/nvidia/bin" / name).exists():
            return str(tool)
    return shutil.which(name)


def missing_tools() -> list[str]:
    """What `build` needs and is not here."""
    found = {"nvcc": shutil.which("nvcc"), "g++": shutil.which("g++"), "cuobjdump": find_tool("cuobjdump")}
    return [name for name, path in found.items() if path is None]


def build() -> Interpreter:
    """Compiles the kernels for sm_90 and the interpreter of what comes out, both once for the same sources."""
    if missing := missing_tools():
        raise RuntimeError(f"machine_code: needs {', '.join(missing)}")
    sources = [*cuda_on_cpu.sources(), *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    library = cuda_on_cpu.BUILD_DIR / f"machine_code_{digest}.so"
    cubin = library.with_suffix(".cubin")
    host = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-frounding-math", "-fPIC", "-shared"]
    device = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-cubin"]
    for command, source, target in (
        ([*host, "-Wno-unknown-pragmas"], HERE / "mutual_match.cpp", library),
        (device, HERE / "kernels.cu", cubin),
    ):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(f".{os.getpid()}")  # other test processes may be building it too
            subprocess.run([*command, str(source), "-o", str(unfinished)], check=True)
            unfinished.replace(target)
    return Interpreter(library, cubin)


def dump(cubin: Path, option: str) -> str:
    tool = find_tool("cuobjdump")
    assert tool is not None
    return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout


def elf_section(data: bytes, begin: bytes, contained: bytes) -> bytes:
    """The first section of an ELF file whose name begins like this and contains that; empty if there is none."""
    (headers_at,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    # Of each section: where its name is among the names, where it lies, and its length.
    headers = [struct.unpack_from("<I20xQQ", data, headers_at + index * size) for index in range(count)]
    names_at = headers[names_index][1]
    for name_at, place, length in headers:
        name = data[names_at + name_at :].split(b"\0", 1)[0]
        if name.startswith(begin) and contained in name:
            return data[place : place + length]
    return b""


class Interpreter(cuda_on_cpu.Emulator):
    """The kernels' machine code, and what executes it."""

    def __init__(self, library: Path, cubin: Path) -> None:
        super().__init__(library)
        usage = dump(cubin, "--dump-resource-usage")
        for kernel in KERNELS:
            numbers = re.search(rf"{kernel}\S*\s+REG:(\d+) STACK:0 SHARED:(\d+) LOCAL:0 .*CONSTANT\[0\]:(\d+)", usage)
            assert numbers is not None, f"{kernel} spills, or is not there: {usage}"
            registers, shared, constants = map(int, numbers.groups())
            table = elf_section(cubin.read_bytes(), b".nv.constant2.", kernel.encode())
            self.library.describe_kernel(
                kernel.encode(),
                registers,
                ctypes.c_int64(max(0, shared - SHARED_BEGIN)),
                ctypes.c_int64(constants - PARAMETERS),
                table,
                ctypes.c_int64(len(table)),
            )
        self.load(dump(cubin, "-sass"))

    def load(self, listing: str) -> None:
        """Reads instructions from what cuobjdump prints; RuntimeError names the first that is not known."""
        message = ctypes.create_string_buffer(500)
        if self.library.load_listing(listing.encode(), message, len(message)) != 0:
            raise RuntimeError(message.value.decode())

    def counts(self) -> dict[str, Counts]:
        """Of each launch of the last call."""
        counts = (Counts * len(KERNELS))()
        launches = self.library.counts_of_the_last_call(counts, ctypes.c_int64(len(counts)))
        return {KERNELS[of_launch.kernel]: of_launch for of_launch in counts[:launches]}

    def issued(self, kernel: str) -> str:
        """The kernel's instructions, a line each, behind how often the last call issued them."""
        self.library.issued_by_the_last_call.restype = ctypes.c_char_p
        text: bytes = self.library.issued_by_the_last_call(kernel.encode())
        return text.decode()
