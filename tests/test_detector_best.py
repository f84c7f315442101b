"""A run keeps the state of its best evaluation beside its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_data import train_flags

import detector.train
from detector.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 2  # an epoch of 4 images in batches of 2


def test_best_is_the_state_of_the_best_evaluation(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aps = iter([0.2, 0.6, 0.6, 0.4, 0.5, 0.7])
    evaluate, results = detector.train.evaluate, []

    def scripted(*arguments: Any, **options: Any) -> Any:
        if not results:
            results.append(evaluate(*arguments, **options))
        metrics, detections = results[0]
        return {**metrics, "AP": next(aps)}, detections

    monkeypatch.setattr(detector.train, "evaluate", scripted)
    detector.train.main(train_flags(voc, tmp_path, epochs=4, **{"eval-every": 1}))
    best, last = (read_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], best["AP"], last["step"]) == (2 * STEPS, 0.6, 4 * STEPS)
    assert any(not best["model"][name].equal(last["model"][name]) for name in best["model"])

    # Resumed, the run remembers its best: 0.5 is not, 0.7 is.
    detector.train.main(train_flags(voc, tmp_path, epochs=5, resume=True, **{"eval-every": 1}))
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 2 * STEPS
    detector.train.main(train_flags(voc, tmp_path, epochs=6, resume=True, **{"eval-every": 1}))
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 6 * STEPS
    assert next(aps, None) is None


@pytest.mark.parametrize("resume", [None, True])
def test_the_best_of_another_run_is_not_overwritten(resume: bool | None, voc: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"of another run")
    with pytest.raises(ValueError, match=r"already holds a run|best\.pt"):
        detector.train.main(train_flags(voc, tmp_path, resume=resume))
    assert (tmp_path / "best.pt").read_bytes() == b"of another run"
