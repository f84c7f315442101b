"""The cases worked out on paper, on every backend and device, with the objects given in every form."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CASES, Case
from conftest import Target

import mg_ops


def options_of(case: Case) -> dict[str, Any]:
    options = dict(case.options)
    if "box_coder" in options:
        weights, clip = options["box_coder"]
        options["box_coder"] = mg_ops.BoxCoder(weights=weights, clip=clip)
    return options


def assert_expected(match: mg_ops.MutualMatch, case: Case, slack: int = 0) -> None:
    for name, value, expected in zip(mg_ops.MutualMatch._fields, match, case.expected(slack), strict=True):
        assert value.dtype == expected.dtype, name
        assert value.shape == expected.shape, name
        assert value.cpu().tolist() == expected.tolist(), f"{name} of {case.name!r}: {case.clause}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestCase:
    def test_listed(self, case: Case, target: Target) -> None:
        match = mg_ops.mutual_match(
            **case.predictions(target.device),
            **case.listed_objects(target.device),
            **options_of(case),
            backend=target.backend,
        )
        assert_expected(match, case)

    @pytest.mark.parametrize("slack", [0, 3])
    def test_packed(self, case: Case, target: Target, slack: int) -> None:
        """Objects past gt_offsets[B] do not count."""
        match = mg_ops.mutual_match(
            **case.predictions(target.device),
            **case.packed_objects(target.device, slack),
            **options_of(case),
            backend=target.backend,
        )
        assert_expected(match, case, slack)

    def test_in_float64(self, case: Case, target: Target) -> None:
        """Every number of the cases comes from float32, so a wider dtype changes nothing."""
        predictions = {name: value.double() for name, value in case.predictions(target.device).items()}
        objects = case.listed_objects(target.device)
        objects["gt_boxes"] = [boxes.double() for boxes in objects["gt_boxes"]]
        match = mg_ops.mutual_match(**predictions, **objects, **options_of(case), backend=target.backend)
        assert_expected(match, case)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_matches_have_torchvisions_sentinels() -> None:
    torchvision_utils = pytest.importorskip("torchvision.models.detection._utils")
    assert mg_ops.BACKGROUND == torchvision_utils.Matcher.BELOW_LOW_THRESHOLD == -1
    assert mg_ops.IGNORED == torchvision_utils.Matcher.BETWEEN_THRESHOLDS == -2


def test_default_backend_is_the_best_of_the_device() -> None:
    """backend=None gives the same integers, from the compiled library where it is usable."""
    for case in CASES:
        assert_expected(mg_ops.mutual_match(**case.predictions(), **case.listed_objects(), **options_of(case)), case)


def test_strides_do_not_matter() -> None:
    """Strides are read in place: the same values in another memory order give the same answer."""
    for case in CASES:
        arguments = {
            name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in case.predictions().items()
        }
        match = mg_ops.mutual_match(**arguments, **case.listed_objects(), **options_of(case))
        assert_expected(match, case)
