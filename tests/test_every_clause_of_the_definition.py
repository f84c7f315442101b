"""The cases worked out on paper, on every backend and device, with the objects given in every form."""

from __future__ import annotations

import pytest
from cases import CASES, Case
from comparison import assert_same
from conftest import Target
from object_forms import FORMS, in_form, known_or_beyond, of_padded

import mg_ops


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestCase:
    @pytest.mark.parametrize("form", FORMS)
    def test_in_every_form(self, case: Case, target: Target, form: str) -> None:
        arguments = case.arguments(target.device)
        boxes, labels, crowd = (arguments.pop(name, None) for name in ("gt_boxes", "gt_labels", "gt_crowd"))
        objects, is_object = in_form(form, boxes, known_or_beyond(labels), crowd)
        found = mg_ops.mutual_match(**arguments, **objects, backend=target.backend)
        expected = mg_ops.MutualMatch(*(value.to(target.device) for value in case.expected()))
        assert_same(found, expected if is_object is None else of_padded(expected, is_object), case.clause)

    def test_packed_with_slack(self, case: Case, target: Target) -> None:
        """Objects past gt_offsets[B] do not count, and labels are as the case has them."""
        match = mg_ops.mutual_match(**case.arguments(target.device, packed=True, slack=3), backend=target.backend)
        assert_same(match, case.expected(slack=3), case.clause)

    def test_in_float64(self, case: Case, target: Target) -> None:
        """Every number of the cases comes from float32, so a wider dtype changes nothing."""
        arguments = case.arguments(target.device)
        arguments |= {name: value.double() for name, value in case.predictions(target.device).items()}
        arguments["gt_boxes"] = [boxes.double() for boxes in arguments["gt_boxes"]]
        assert_same(mg_ops.mutual_match(**arguments, backend=target.backend), case.expected(), case.clause)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_matches_have_torchvisions_sentinels() -> None:
    torchvision_utils = pytest.importorskip("torchvision.models.detection._utils")
    assert mg_ops.BACKGROUND == torchvision_utils.Matcher.BELOW_LOW_THRESHOLD == -1
    assert mg_ops.IGNORED == torchvision_utils.Matcher.BETWEEN_THRESHOLDS == -2


def test_default_backend_is_the_best_of_the_device() -> None:
    """backend=None gives the same integers, from the compiled library where it is usable."""
    for case in CASES:
        assert_same(mg_ops.mutual_match(**case.arguments()), case.expected(), case.clause)


def test_strides_do_not_matter() -> None:
    """Strides are read in place: the same values in another memory order give the same answer."""
    for case in CASES:
        other = {
            name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in case.predictions().items()
        }
        assert_same(mg_ops.mutual_match(**case.arguments() | other), case.expected(), case.clause)
