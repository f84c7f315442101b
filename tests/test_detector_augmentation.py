"""Augmentation moves boxes with their pixels, and keeps what must be kept."""

from __future__ import annotations

import pytest
import torch

from detector.augment import MEAN_COLOR, TrainingTransform, crop_by_iou, zoom_out


def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A black image of 120 x 90 with two white rectangles, and their boxes."""
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20, 50, 60], [70, 30, 110, 80]])
    for x1, y1, x2, y2 in boxes.int().tolist():
        image[:, y1:y2, x1:x2] = 255
    return image, boxes, torch.tensor([3, 5]), torch.tensor([False, False])


@pytest.mark.parametrize("seed", range(40))
def test_boxes_move_with_their_pixels(seed: int) -> None:
    torch.manual_seed(seed)
    transform = TrainingTransform(96)
    transform.distort = lambda image: image  # the colors must stay to be found again
    image, boxes, labels, _ = transform(*scene())
    assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
    white = (image > 200).all(0)
    for x1, y1, x2, y2 in boxes.tolist():
        # One pixel of tolerance: the image lands on whole pixels.
        inner = white[int(y1) + 2 : int(y2) - 1, int(x1) + 2 : int(x2) - 1]
        assert inner.numel() == 0 or inner.float().mean() > 0.98
        outer = torch.zeros_like(white)
        outer[max(int(y1) - 2, 0) : int(y2) + 3, max(int(x1) - 2, 0) : int(x2) + 3] = True
        white = white & ~outer
    if len(boxes) == 2:
        assert white.sum() == 0
    assert labels.tolist() in ([3, 5], [3], [5])
    assert ((boxes >= 0) & (boxes <= 96)).all()


def test_over_many_draws_every_kind_of_view_occurs() -> None:
    torch.manual_seed(0)
    transform = TrainingTransform(64)
    counts = {"both": 0, "one": 0, "canvas": 0, "flipped": 0}
    for _ in range(200):
        image, boxes, _, _ = transform(*scene())
        counts["both"] += len(boxes) == 2
        counts["one"] += len(boxes) == 1
        counts["canvas"] += bool((image == torch.tensor(MEAN_COLOR).view(3, 1, 1)).all(0).any())
        counts["flipped"] += len(boxes) == 2 and bool(boxes[0, 0] > boxes[1, 0])
    assert all(count > 20 for count in counts.values()), counts
    assert counts["both"] + counts["one"] == 200  # a crop always holds the center of an object


def test_the_zoomed_out_region_holds_the_image() -> None:
    torch.manual_seed(0)
    regions = torch.stack([zoom_out(120, 90) for _ in range(300)])
    assert (regions[:, :2] <= 1e-4).all() and (regions[:, 2] >= 120 - 1e-3).all() and (regions[:, 3] >= 90 - 1e-3).all()
    sizes = regions[:, 2] - regions[:, 0]
    assert sizes.max() <= 480.01
    assert 0.5 < (sizes > 120.01).float().mean() < 0.7


def test_a_crop_holds_an_object_with_a_shape_that_is_not_extreme() -> None:
    torch.manual_seed(0)
    _, boxes, _, _ = scene()
    region = torch.tensor([0.0, 0, 120, 90])
    for _ in range(100):
        crop = crop_by_iou(region, boxes)
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert ((center > crop[:2]) & (center < crop[2:])).all(1).any()
        width, height = (crop[2:] - crop[:2]).tolist()
        assert 0.5 <= width / height <= 2


def test_an_image_without_objects_stays_background() -> None:
    torch.manual_seed(0)
    image, _, _, _ = scene()
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    for _ in range(10):
        out, boxes, labels, crowd = TrainingTransform(64)(image, *nothing)
        assert out.shape == (3, 64, 64)
        assert boxes.shape == (0, 4) and labels.shape == (0,) and crowd.shape == (0,)


def test_a_crowd_region_stays_as_far_as_it_is_seen() -> None:
    torch.manual_seed(0)
    image, boxes, labels, _ = scene()
    boxes = torch.cat([boxes, torch.tensor([[0.0, 0, 120, 90]])])
    labels, crowd = torch.cat([labels, torch.tensor([0])]), torch.tensor([False, False, True])
    for _ in range(50):
        _, _, _, kept = TrainingTransform(64)(image, boxes, labels, crowd)
        assert kept.sum() == 1
