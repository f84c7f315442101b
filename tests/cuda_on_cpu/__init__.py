"""The CUDA kernels of csrc/cuda run on the CPU: the same source, compiled by g++ against `cuda_on_cpu.h`.

    emulator = cuda_on_cpu.build(threads=64)
    match = emulator.mutual_match(anchors, gt_boxes, gt_labels, cls_logits=..., pred_boxes=..., seed=7)

The seed decides the order in which the threads run. By itself,

    python tests/cuda_on_cpu --sanitize --threads 64 --batches 100

compares them with the reference on all named cases and on random batches; the tests do the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import assert_same
from operators import backend_is, operator_arguments
from torch import Tensor

import mg_ops
from mg_ops import matching
from mg_ops.reference import split_arguments
from mg_ops.rules.operators import RULES

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD_DIR = ROOT / "build" / "tests"
FLOAT_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
INTEGER_TYPES = {torch.int32: 0, torch.int64: 1}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


class StridedArray(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("type", ctypes.c_int32),
        ("whole_rows", ctypes.c_int32),
    )


class EmulatedCall(ctypes.Structure):
    """As in mutual_match_call.h."""

    _fields_ = (
        *(
            (name, StridedArray)
            for name in ("anchors", "pred_boxes", "cls_scores", "gt_boxes", "gt_labels", "gt_offsets")
        ),
        ("gt_crowd", StridedArray),
        *((name, ctypes.c_int64) for name in ("batch_size", "num_anchors", "num_classes", "num_gt")),
        ("decode", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("weight_x", "weight_y", "weight_w", "weight_h", "clip")),
        ("scores_are_probabilities", ctypes.c_int32),
        ("classification_by_regressed", ctypes.c_int32),
        ("localization_by_amplified", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("sigma", "iou_positive", "iou_ignored", "crowd_overlap")),
        *((name, ctypes.c_void_p) for name in ("cls_match", "loc_match", "num_pos", "num_total")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("scores_read", "scratch_bytes", "launches")),
    )


def sources() -> list[Path]:
    return sorted(
        [*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh")]
    )


def build(threads: int = 256, list_room: int = 2048, sanitize: bool = False) -> Emulator:
    """Compiles the kernels for the CPU (once: the file name carries a hash of the sources and options).

    Args:
        threads: of a block. Small blocks run faster here, and cut the same work into more pieces.
        list_room: how long an object's list may be; with a tiny one nearly all objects are ranked from all anchors.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; the process must then have libasan preloaded
            (`sanitizer_environment`).
    """
    return Emulator(compile_kernels("mutual_match_on_cpu.cpp", threads, list_room, sanitize))


def compile_kernels(source: str, threads: int = 256, list_room: int = 2048, sanitize: bool = False) -> Path:
    """The library that `build` compiles from a source beside this file; the arguments are those of `build`."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("cuda_on_cpu: needs g++")
    flags = ["-std=c++17", "-O2", "-g", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", f"-DMG_OPS_CUDA_THREADS={threads}", f"-DMG_OPS_CUDA_LIST_ROOM={list_room}"]
    flags += SANITIZERS if sanitize else []
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources()) + repr(flags).encode()).hexdigest()[:12]
    library = BUILD_DIR / f"{Path(source).stem}_{threads}_{list_room}{'_sanitized' if sanitize else ''}_{digest}.so"
    if not library.exists():
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")  # other test processes may be building it too
        subprocess.run([compiler, *flags, str(HERE / source), "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    return library


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python can load a sanitized emulator."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE.parent}",
    }


class Emulator:
    """A compiled set of kernels."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.threads = self.library.threads_of_a_block()
        self.list_room = self.library.list_room()
        self.last_call = EmulatedCall()
        """Of the last call: its `scores_read` (loads of cls_scores), `scratch_bytes` and `launches`."""

    def notes(self) -> dict[str, int]:
        """How often the last call did something rare: see MG_OPS_NOTE in the kernels."""
        self.library.notes_of_the_last_call.restype = ctypes.c_char_p
        lines = self.library.notes_of_the_last_call().decode().splitlines()
        return {what: int(count) for count, what in (line.split(" ", 1) for line in lines)}

    def mutual_match(self, *arguments: Any, seed: int = 0, **options: Any) -> mg_ops.MutualMatch:
        """`mg_ops.mutual_match` by these kernels, on CPU tensors; RuntimeError says what the emulator caught.

        Args:
            seed: of the order in which threads run.
        """

        def operator(*arguments: Any) -> mg_ops.MutualMatch:
            RULES["mutual_match"].check(*arguments)
            return self.operator(*arguments, seed=seed)

        with backend_is(operator):
            return matching.mutual_match(*arguments, **options)

    def operator(self, *arguments: Any, seed: int = 0) -> mg_ops.MutualMatch:
        """As the operators, but that nothing is checked: a GPU clamps offsets."""
        inputs, options = split_arguments(arguments)
        anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder, _ = inputs
        batch_size, num_anchors, num_classes = cls_scores.shape
        num_gt = len(gt_boxes)
        # Whatever memory held before must not show.
        result = mg_ops.MutualMatch(
            torch.full((batch_size, num_anchors), 0x5A5A5A5A5A5A5A5A),
            torch.full((batch_size, num_anchors), 0x5A5A5A5A5A5A5A5A),
            torch.full((num_gt,), 0x5A5A5A5A, dtype=torch.int32),
            torch.full((num_gt,), 0x5A5A5A5A, dtype=torch.int32),
        )
        call = EmulatedCall(
            rows(anchors.detach()),
            rows(pred_boxes.detach()),
            rows(cls_scores.detach()),
            rows(gt_boxes.detach()),
            integers(gt_labels),
            integers(gt_offsets),
            StridedArray() if gt_crowd is None else StridedArray(gt_crowd.data_ptr(), (gt_crowd.stride(0), 0, 0), 0, 0),
            batch_size,
            num_anchors,
            num_classes,
            num_gt,
            box_coder is not None,
            *(box_coder or [1.0] * 5),
            inputs.scores_are_probabilities,
            *options,
            *(tensor.data_ptr() for tensor in result),
            seed,
        )
        message = ctypes.create_string_buffer(500)
        if self.library.mutual_match_on_cpu(ctypes.byref(call), message, len(message)) != 0:
            raise RuntimeError(message.value.decode())
        self.last_call = call
        return result

    def run_mistake(self, mistake: int, seed: int = 0) -> list[int]:
        """Runs a kernel that reverses 0, 1, 2 ... with a mistake of this number (mutual_match_on_cpu.cpp; 0: none)."""
        output = (ctypes.c_uint32 * self.threads)()
        message = ctypes.create_string_buffer(500)
        if self.library.run_mistake(mistake, ctypes.c_uint64(seed), output, message, len(message)) != 0:
            raise RuntimeError(message.value.decode())
        return list(output)


def check_against_reference(emulator: Emulator, batches: range, case_seed: int) -> int:
    """Compares the kernels with the expected result of every named case and with the reference on random batches.

    Args:
        batches: the seeds of the random batches; each is also the seed of the threads' order.
        case_seed: the seed of the threads' order in the named cases.

    Returns:
        How many batches were compared.

    Raises:
        AssertionError: naming the case or the batch, and the first difference.
    """
    from cases import CASES
    from random_batches import random_batch

    for case in CASES:
        match = emulator.mutual_match(**case.arguments(packed=True, slack=2), seed=case_seed)
        assert_same(match, case.expected(slack=2), f"{case.name}: {case.clause}")
    for seed in batches:
        batch = random_batch(seed)
        match = emulator.mutual_match(**batch.arguments, seed=seed)
        assert_same(match, mg_ops.mutual_match(**batch.arguments, backend="eager"), batch)
    return len(CASES) + len(batches)


def wrong_offsets(seed: int, batch_size: int, num_gt: int) -> Tensor:
    """(batch_size + 1,) offsets that are hardly ever right: huge, negative, decreasing, or all of that."""
    random = np.random.default_rng([seed, 5])
    dtype = torch.int32 if random.random() < 0.3 else torch.int64
    limits = torch.iinfo(dtype)
    extremes = [limits.min, limits.max, -1, 0, 1, num_gt, num_gt + 1, num_gt - 1, 2**31 - 1, -(2**31)]
    offsets = random.integers(-2, num_gt + 3, batch_size + 1)
    kind = random.integers(0, 5)
    if kind == 0:
        offsets = np.sort(offsets)[::-1].copy()
    elif kind == 1:
        offsets = np.array([extremes[random.integers(0, len(extremes))] for _ in offsets], dtype=np.int64)
    elif kind == 2:
        offsets = random.integers(limits.min, limits.max, batch_size + 1, dtype=np.int64)
    elif kind == 3:
        offsets[random.integers(0, batch_size + 1)] = extremes[random.integers(0, len(extremes))]
    return torch.from_numpy(offsets).to(dtype)


def check_wrong_offsets(emulator: Emulator, batches: range) -> int:
    """Compares the kernels with the reference on random batches with offsets that no CPU backend would take.

    Arguments, result and errors as of `check_against_reference`.
    """
    from random_batches import random_batch

    for seed in batches:
        batch = random_batch(seed)
        arguments = list(operator_arguments(**batch.arguments))
        batch_size, num_gt = arguments[2].shape[0], len(arguments[3])
        arguments[5] = wrong_offsets(seed, batch_size, num_gt)
        match = emulator.operator(*arguments, seed=seed)
        expected = mg_ops.reference.mutual_match(*arguments)
        assert_same(match, expected, f"{batch} with offsets {arguments[5].tolist()}")
    return len(batches)


def rows(tensor: Tensor) -> StridedArray:
    """A floating tensor (A, 4) or (B, A, any) as the kernels take it; the counterpart of csrc/mutual_match.h."""
    strides = tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride())
    row_bytes = min(16, 4 * tensor.element_size())
    whole_rows = (
        tensor.shape[-1] == 4
        and strides[2] == 1
        and strides[0] % 4 == 0
        and strides[1] % 4 == 0
        and tensor.data_ptr() % row_bytes == 0
    )
    return StridedArray(tensor.data_ptr(), strides, FLOAT_TYPES[tensor.dtype], whole_rows)


def integers(tensor: Tensor) -> StridedArray:
    return StridedArray(tensor.data_ptr(), (tensor.stride(0), 0, 0), INTEGER_TYPES[tensor.dtype], 0)
