"""Every variant of the Triton kernels compiles for NVIDIA and AMD GPUs, the match with exact arithmetic, without a GPU.

The interpreter of test_triton_interpreted.py accepts code that the compiler rejects, and rounds nothing together: what
the compiler makes of the kernels is looked at here, in the assembly.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._inductor.codegen import wrapper  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton_counts import CHIPS, KERNELS, NoDriver, compile_kernel, compile_loss, resources  # noqa: E402

from mg_ops import backend_choice  # noqa: E402
from mg_ops import losses as public_losses  # noqa: E402
from mg_ops.loss_definitions import BOX_LOSSES  # noqa: E402
from mg_ops.triton import losses, mutual_match  # noqa: E402

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


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def class_loss(**options: Any) -> tuple[Any, dict[str, Any]]:
    """Its kernel, and the compile-time constants that take most instructions, but for these."""
    most = {"HAS_SOFT_TARGETS": True, "WEIGH_BY_TARGET": True, "EXPONENT": 3, "CONTIGUOUS": False, "GRADIENT": True}
    return losses.class_loss_kernel, {**most, "BLOCK": losses.CLASS_LOSS_BLOCK, **options}


def box_loss(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """As `class_loss`."""
    most = {"HAS_WEIGHTS": True, "DECODE": True, "LOSS": BOX_LOSSES.index(name), "GRADIENT": True}
    return losses.box_loss_kernel, {**most, "BLOCK": losses.BOX_LOSS_BLOCK, **options}


def distribution_loss(num_bins: int, **options: Any) -> tuple[Any, dict[str, Any]]:
    """As `class_loss`."""
    size = {"BLOCK": losses.DISTRIBUTION_LOSS_BLOCK // num_bins, "BINS": num_bins}
    return losses.distribution_loss_kernel, {"HAS_WEIGHTS": True, "GRADIENT": True, **size, **options}


LOSSES = {
    "class loss": class_loss(),
    "focal loss": class_loss(HAS_SOFT_TARGETS=False, WEIGH_BY_TARGET=False, EXPONENT=2, CONTIGUOUS=True),
    "balanced L1": box_loss("released_balanced_l1"),
    "CIoU": box_loss("ciou"),
    "distribution focal": distribution_loss(16),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.mark.parametrize("chip", CHIPS)
@every_loss
def test_the_losses_fit_their_registers(loss: Any, chip: str) -> None:
    for dtype, gradient in (("bf16", True), ("fp32", False)):
        compiled = compile_loss(loss[0], chip, dtype, loss[1] | {"GRADIENT": gradient})
        if chip.startswith("sm_"):
            assert resources(compiled).spilled == 0, (dtype, gradient)
        else:
            assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]) == ["0"]


@pytest.mark.slow
def test_every_variant_of_the_losses_compiles() -> None:
    """For sm_90; the longest ones are compiled for every chip above."""
    names = ("HAS_SOFT_TARGETS", "CONTIGUOUS", "GRADIENT")
    variants = [
        class_loss(EXPONENT=exponent, **dict(zip(names, switches, strict=True)))
        for switches in itertools.product((False, True), repeat=len(names))
        for exponent in range(4)
    ]
    for gradient in (False, True):
        variants += [
            box_loss(name, DECODE=decode, GRADIENT=gradient) for name in BOX_LOSSES for decode in (False, True)
        ]
        variants += [distribution_loss(num_bins, GRADIENT=gradient) for num_bins in (2, 32, 1024)]
    for (kernel, options), dtype in zip(variants, itertools.cycle(("fp32", "fp16", "bf16", "fp64", "bf16"))):
        assert resources(compile_loss(kernel, "sm_90", dtype, options)).spilled == 0, (options, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_are_read_and_gradients_written_16_bytes_at_once(dtype: str) -> None:
    ptx = compile_loss(LOSSES["focal loss"][0], "sm_90", dtype, LOSSES["focal loss"][1]).asm["ptx"]
    wide = losses.CLASS_LOSS_BLOCK // (32 * losses.WARPS) * (4 if dtype == "fp32" else 2) // 16
    accesses = Counter(re.findall(r"(?:ld|st)\.[\w.:]*global[\w.:]*", ptx))
    assert accesses["ld.global.v4.b32"] == accesses["st.global.v4.b32"] == wide


@every_loss
def test_a_loss_compiles_once_for_all_sizes(loss: Any) -> None:
    """But for the number of logits, whose multiples of 16 are read faster."""
    for parameter in loss[0].params:
        if parameter.annotation_type in ("i32", "i64") and parameter.name != "total":
            assert parameter.do_not_specialize, parameter.name


@pytest.fixture
def a_gpu_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enough of one to trace calls of fake tensors."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend_choice, "_usage_error", lambda backend, index: "" if backend == "triton" else "absent")
    before = vars(triton.runtime.driver).copy()
    triton.runtime.driver.set_active(NoDriver())
    yield
    vars(triton.runtime.driver).update(before)


def graph_of(function: Callable[..., Any], *arguments: Any) -> torch.fx.Graph:
    """What torch.compile hands to its backend; only where nothing is read back it is one graph."""
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    torch.compile(function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))(*arguments)
    assert len(graphs) == 1
    return graphs[0]


def test_torch_compile_sees_the_kernels(a_gpu_to_compile_for: None) -> None:
    """One kernel a loss, of which it knows that it writes its result alone, and one for its derivative."""
    with FakeTensorMode(), torch.no_grad():
        device = torch.device("cuda:0")
        logits, targets = torch.empty(2, 30, 64, device=device), torch.empty(2, 30, device=device, dtype=torch.int64)
        anchors, gt_offsets = torch.empty(30, 4, device=device), torch.empty(3, device=device, dtype=torch.int64)
        scalar, operators = torch.empty((), device=device), torch.ops.mg_ops
        positives = (anchors, targets, anchors[:5], gt_offsets, None)
        numbers = ([10.0, 10.0, 5.0, 5.0, 4.0], BOX_LOSSES.index("giou"), 1.0, 1.0, 1.0)
        calls = [
            lambda x: public_losses.focal_loss(x, targets, normalizer=scalar),
            lambda x: operators.class_loss_triton_backward(scalar, x, targets, None, 1.0, 2.0, 1.0, 2.0, False),
            lambda x: operators.box_loss_triton(x[..., :4], *positives, *numbers),
            lambda x: operators.box_loss_triton_backward(scalar, x[..., :4], *positives, *numbers),
            lambda x: operators.distribution_loss_triton(x, *positives, anchors[:, 0], 0.01),
            lambda x: operators.distribution_loss_triton_backward(scalar, x, *positives, anchors[:, 0], 0.01),
        ]
        for call in calls:
            nodes = graph_of(call, logits).nodes
            kernels = [node for node in nodes if "triton_kernel_wrapper" in str(node.target)]
            assert [kernel.kwargs["tensors_to_clone"] for kernel in kernels] == [["result"]]
            assert not [node for node in nodes if "mg_ops" in str(node.target)]


@every_loss
def test_what_torch_compile_copies_compiles(loss: Any, tmp_path: Path) -> None:
    """It copies a kernel and what it calls into a file, with numbers in float64 and sizes of 1 as constants."""
    kernel, options = loss
    copied = wrapper.user_defined_triton_kernel_transitive_closure_source_code(kernel)
    path = tmp_path / f"copied_{kernel.__name__}.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n\n@triton.jit\n{copied}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    given = {parameter.name: parameter.annotation_type for parameter in kernel.params}
    sizes: dict[str, Any] = {name: "fp64" for name, type_ in given.items() if type_ == "fp32"}
    sizes |= {name: "i32" for name, type_ in given.items() if type_ == "i64"}
    ones = ("num_anchors", "num_classes", "num_gt", "stride_b", "stride_a", "stride_c", "stride_x")
    sizes |= {name: 1 for name in given if name in ones}
    ptx = compile_loss(getattr(module, kernel.__name__), "sm_90", "bf16", options, sizes).asm["ptx"]
    assert not re.findall(r"\b(?:add|sub|mul|div|fma|ex2|setp)\.[\w.]*f64", ptx)


def test_importing_mg_ops_does_not_import_triton() -> None:
    """Nor the compiler of torch: both take longer than the rest together."""
    code = "import sys, mg_ops; mg_ops.backends(); sys.exit(bool({'triton', 'torch._dynamo'} & set(sys.modules)))"
    root = Path(mutual_match.__file__).parents[2]
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, check=False).returncode == 0
