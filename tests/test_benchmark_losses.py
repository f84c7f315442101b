"""benchmarks/losses.py compares losses that are equal, and says what each costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torchvision")  # of the benchmarks

from benchmarks import losses

TINY = ["--batch", "2", "--anchors", "400", "--classes", "5", "--turns", "2", "--threads", "1"]


def test_every_loss_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    assert losses.main([*TINY, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["losses"]
    assert list(rows) == ["mg_ops", "without one-hot", "one-hot"]
    for row in rows.values():
        low, median, high = row["quartiles"]
        assert 0 < low <= median <= high and row["extra_bytes"] >= 0
    assert "2 images, 400 anchors, 5 classes; medians of 2" in capsys.readouterr().out


def test_a_loss_with_another_value_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.LOSSES, "mg_ops", lambda logits, targets: logits.sum())
    assert losses.main([*TINY, "--output", str(tmp_path / "figures.json")]) == 1
    assert "mg_ops: expected a loss of" in capsys.readouterr().out
