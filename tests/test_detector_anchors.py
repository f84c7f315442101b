"""The anchors are those of the published setting: 12,750 at 320 pixels, six a cell, clipped to the image."""

from __future__ import annotations

import pytest
import torch

from detector.anchors import level_cells, make_anchors


@pytest.mark.parametrize(
    ("image_size", "cells", "count"),
    [
        (320, [40, 20, 10, 5], 12_750),
        (512, [64, 32, 16, 8, 4], 32_736),
        (160, [20, 10, 5, 3], 6 * (400 + 100 + 25 + 9)),
    ],
)
def test_counts_at_each_size(image_size: int, cells: list[int], count: int) -> None:
    assert level_cells(image_size) == cells
    assert make_anchors(image_size).shape == (count, 4)


def test_values_worked_out_by_hand() -> None:
    anchors = make_anchors(320)
    # Cell (row 20, column 10) of the stride-8 level: center (84, 164), first anchor 24 x 24.
    first = 6 * (20 * 40 + 10)
    assert anchors[first].tolist() == [72, 152, 96, 176]
    # Ratio 2: 24 * sqrt 2 by 24 / sqrt 2.
    torch.testing.assert_close(anchors[first + 1], torch.tensor([67.02944, 155.51472, 100.97056, 172.48528]))
    # Ratio 1/2: the same, upright.
    torch.testing.assert_close(anchors[first + 2], torch.tensor([75.51472, 147.02944, 92.48528, 180.97056]))
    # Twice the area at ratio 2: 48 by 24.
    torch.testing.assert_close(anchors[first + 4], torch.tensor([60.0, 152.0, 108.0, 176.0]))
    # The coarsest level's last cell: center (288, 288), side 192, cut by the image.
    torch.testing.assert_close(anchors[-6], torch.tensor([192.0, 192.0, 320.0, 320.0]))
    # The very first anchor: center (4, 4), cut at the corner.
    assert anchors[0].tolist() == [0, 0, 16, 16]


def test_one_square_a_location_stands_for_its_point() -> None:
    anchors = make_anchors(320, 8.0, anchors_per_location=1)
    assert anchors.shape == (1600 + 400 + 100 + 25, 4)
    assert anchors[0].tolist() == [0, 0, 8, 8] and anchors[1600].tolist() == [0, 0, 16, 16]
    assert make_anchors(320, 24.0, anchors_per_location=1)[0].tolist() == [-8, -8, 16, 16]  # not clipped
    with pytest.raises(ValueError, match="anchors_per_location: expected 1 or 6, got 3"):
        make_anchors(320, anchors_per_location=3)


def test_every_anchor_lies_in_the_image_and_has_an_area() -> None:
    for image_size in (64, 96, 320, 512):
        anchors = make_anchors(image_size)
        assert anchors.min() >= 0 and anchors.max() <= image_size
        assert ((anchors[:, 2:] - anchors[:, :2]) > 0).all()


@pytest.mark.parametrize("image_size", [0, 32, 100, 333])
def test_a_size_the_pyramid_cannot_halve_is_refused(image_size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        make_anchors(image_size)


def test_a_smaller_base_shrinks_every_anchor_about_its_center() -> None:
    assert make_anchors(320, 12.0).shape == (12_750, 4)
    first = 6 * (20 * 40 + 10)  # the cell centerd on (84, 164)
    assert make_anchors(320, 12.0)[first].tolist() == [78, 158, 90, 170]


@pytest.mark.parametrize("base_size", [0.0, -1.0, 400.0, float("nan")])
def test_a_base_that_is_no_side_within_the_image_is_refused(base_size: float) -> None:
    with pytest.raises(ValueError, match="within the image"):
        make_anchors(320, base_size)
