"""The label conventions of other libraries say the same as `mg_ops`'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mg_ops
from mg_ops.adapters import labels

ROOT = Path(__file__).parent.parent
HAND_MADE = torch.tensor([[3, -1, -2], [0, 1, -1]])


def test_mmdet_counts_from_one() -> None:
    assert labels.to_mmdet(HAND_MADE).tolist() == [[4, 0, -1], [1, 2, 0]]


def test_detectron2_has_indices_and_labels() -> None:
    matched_idxs, match_labels = labels.to_detectron2(HAND_MADE)
    assert matched_idxs.tolist() == [[3, 0, 0], [0, 1, 0]]
    assert match_labels.tolist() == [[1, 0, -1], [1, 1, 0]]
    assert match_labels.dtype == torch.int8


def test_torchvision_needs_no_conversion() -> None:
    matcher = pytest.importorskip("torchvision.models.detection._utils").Matcher
    assert matcher.BELOW_LOW_THRESHOLD == mg_ops.BACKGROUND
    assert matcher.BETWEEN_THRESHOLDS == mg_ops.IGNORED


def test_wrong_tensors_are_named() -> None:
    with pytest.raises(TypeError, match=r"match: expected a signed integer tensor, got a torch\.float32 tensor"):
        labels.to_mmdet(torch.zeros(2))


def test_importing_mg_ops_imports_no_adapter() -> None:
    code = (
        "import sys, mg_ops; loaded = set(sys.modules); import mg_ops.adapters, mg_ops.adapters.labels; "
        "print(*sorted(name for name in loaded if name.startswith(('mg_ops.adapters', 'torchvision', 'mmdet'))), "
        "*sorted(name for name in set(sys.modules) - loaded if not name.startswith('mg_ops')))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.split() == []
