"""ATSS: answers worked out by hand, and the labels of mmdetection's `ATSSAssigner` and MONAI's `ATSSMatcher`.

The libraries leave open which of two equally near anchors is a candidate. So every label that differs is traced to an
object in some level of which the k-th nearest anchor and the next are equally far, or to a number within 1e-6 of the
one that it is compared with. What mmdetection gives for the same anchors in another order is compared in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Target, fuzz_cases
from cuda_on_cpu import rules as emulated
from pyramid_batches import pyramid_batch
from random_batches import to_device
from rule_batches import arguments_of, assert_same_match
from torch import Tensor

import mg_ops
from benchmarks import upstream
from mg_ops.rules.eager.arithmetic import square_root

BACKGROUND, IGNORED = mg_ops.BACKGROUND, mg_ops.IGNORED

WITHOUT_TRITON = True


def box(x: float, width: float = 10.0) -> list[float]:
    """Of height 10, around x."""
    return [x - width / 2, 0.0, x + width / 2, 10.0]


def labels(target: Target, levels: list[list[list[float]]], gt_boxes: list[list[float]], **options: Any) -> list[int]:
    match = mg_ops.atss_match(
        [torch.tensor(level, device=target.device).reshape(-1, 4) for level in levels],
        [torch.tensor(gt_boxes, device=target.device).reshape(-1, 4)],
        [torch.zeros(len(gt_boxes), dtype=torch.int64, device=target.device)],
        backend=target.backend,
        **options,
    )
    assert match.num_pos.tolist() == [match.cls_match[0].tolist().count(index) for index in range(len(gt_boxes))]
    assert match.soft_targets is None
    return match.cls_match[0].tolist()


def test_the_threshold_is_mean_plus_deviation(target: Target) -> None:
    """IoUs 1, 0.5 and 0: mean 0.5, deviation 0.5. With 0.9 in the place of 0.5: 0.633 and 0.551."""
    assert labels(target, [[box(0), box(0, 5), box(20)]], [box(0)]) == [0, BACKGROUND, BACKGROUND]
    assert labels(target, [[box(0), box(0, 9), box(20)]], [box(0)]) == [BACKGROUND] * 3
    # Two of four: mean 0.475, deviation 0.55.
    assert labels(target, [[box(0), box(0, 9), box(20), box(30)]], [box(0)]) == [BACKGROUND] * 4
    # Of six: mean 0.317, deviation 0.491.
    far = [box(20), box(30), box(40), box(50)]
    assert labels(target, [[box(0), box(0, 9), *far]], [box(0)]) == [0, 0, *[BACKGROUND] * 4]


def test_candidates_are_the_nearest_of_each_level(target: Target) -> None:
    """The best anchors of the object are not its candidates: others are nearer."""
    level = [box(0, 2), box(1, 1), box(-1, 1), box(2)]
    assert labels(target, [level], [box(0)], k=3) == [0, BACKGROUND, BACKGROUND, BACKGROUND]
    assert labels(target, [level], [box(0)], k=4) == [BACKGROUND, BACKGROUND, BACKGROUND, 0]
    # The others are a level of their own, of which all are candidates.
    assert labels(target, [level[:3], level[3:]], [box(0)], k=3) == [BACKGROUND, BACKGROUND, BACKGROUND, 0]


def test_the_lower_anchor_is_nearer_on_a_tie(target: Target) -> None:
    """Those at -3 and 3 are equally near, and overlap the object differently."""
    center, left, right = box(0, 1), box(-3, 8), box(3, 4)
    assert labels(target, [[center, right, left]], [box(0)], k=2) == [BACKGROUND] * 3
    assert labels(target, [[center, right, left, box(30)], [box(40)]], [box(0)], k=2) == [
        BACKGROUND,
        0,
        BACKGROUND,
        BACKGROUND,
        BACKGROUND,
    ]
    assert labels(target, [[center, left, right, box(30)], [box(40)]], [box(0)], k=2) == [
        BACKGROUND,
        0,
        BACKGROUND,
        BACKGROUND,
        BACKGROUND,
    ]


def test_distances_that_round_to_one_number_tie(target: Target) -> None:
    """The square root of two different sums of squares: the lower anchor is nearer, though it is not."""
    found = 0
    for x, y in 0.9 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0)):
        farther = torch.nextafter(x, torch.ones(()))
        squares = torch.stack([x * x + y * y, farther * farther + y * y])
        if squares[0] == squares[1] or len(square_root(squares).unique()) > 1:
            continue
        found += 1
        level = [[0.0, 0.0, 2 * float(farther), 2 * float(y)], [0.0, 0.0, 2 * float(x), 2 * float(y)]]
        assert labels(target, [level], [[-1.0, -1.0, 1.0, 1.0]], k=1) == [0, BACKGROUND]
    assert found > 5


def test_the_center_of_a_positive_is_inside(target: Target) -> None:
    """By more than the margin. The anchor at 4.75 has IoU 0.36, the others 0."""
    level = [box(4.75), box(20), box(30), box(40)]
    for margin, wanted in [(0.01, 0), (0.24, 0), (0.25, BACKGROUND), (1.0, BACKGROUND), (None, 0)]:
        assert labels(target, [level], [box(0)], center_margin=margin)[0] == wanted
    outside = [box(7), box(20), box(30), box(40)]
    assert labels(target, [outside], [box(0)], center_margin=0.0)[0] == BACKGROUND
    assert labels(target, [outside], [box(0)], center_margin=None)[0] == 0


def test_the_largest_iou_takes_an_anchor(target: Target) -> None:
    far = [box(40), box(50), box(60), box(70)]
    assert labels(target, [[box(0), *far]], [box(0, 8), box(0), box(0, 9)])[0] == 1
    assert labels(target, [[box(0), *far]], [box(0, 8), box(0, 9), box(0, 9)])[0] == 1  # on a tie the lower


def test_one_candidate_needs_no_deviation(target: Target) -> None:
    assert labels(target, [[box(1)]], [box(0)]) == [0]
    assert labels(target, [[box(1), box(2)]], [box(0)], k=1) == [0, BACKGROUND]
    assert labels(target, [[box(1)], []], [box(0)]) == [0]


def test_anchors_that_do_not_overlap_are_no_positives(target: Target) -> None:
    """Though their IoU, 0, is the mean of all."""
    assert labels(target, [[box(20), box(30)]], [box(0)], center_margin=None) == [BACKGROUND] * 2
    assert labels(target, [[[1.0, 1.0, 1.0, 1.0]] * 3], [box(0)]) == [BACKGROUND] * 3


def test_bad_boxes_match_nothing(target: Target) -> None:
    nan, inf = float("nan"), float("inf")
    bad = [[5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 3.0, 9.0], [nan, 0.0, 5.0, 5.0], box(5, inf), [-inf, -inf, inf, inf]]
    far = [box(40), box(50), box(60), box(70)]
    assert labels(target, [[box(0), *far]], [*bad, box(0)]) == [5, *[BACKGROUND] * 4]
    assert labels(target, [[box(0), *far]], bad) == [BACKGROUND] * 5
    assert labels(target, [[box(0), *far]], []) == [BACKGROUND] * 5
    assert labels(target, [[], []], [box(0)]) == []
    # Anchors that are not finite are candidates after all others.
    not_finite = [[nan] * 4, [0.0, 0.0, inf, 10.0], [3e38, 0.0, 3e38, 1.0]]
    assert labels(target, [[*not_finite, box(0), box(0, 4)]], [box(0)], k=2) == [BACKGROUND] * 5
    assert labels(target, [[*not_finite, box(0), box(0, 4)]], [box(0)], k=3) == [*[BACKGROUND] * 3, 0, BACKGROUND]


def test_crowd_regions_ignore_background_and_match_nothing(target: Target) -> None:
    match = mg_ops.atss_match(
        torch.tensor([box(0), box(20), box(24), box(40)], device=target.device),
        [torch.tensor([box(0), box(20)], device=target.device)],
        [torch.zeros(2, dtype=torch.int64, device=target.device)],
        gt_crowd=[torch.tensor([False, True], device=target.device)],
        level_sizes=[4],
        backend=target.backend,
    )
    assert match.cls_match.tolist() == [[0, IGNORED, IGNORED, BACKGROUND]]
    assert match.num_pos.tolist() == [1, 0]


def test_a_matcher_of_levels_compiles(target: Target) -> None:
    """fullgraph=True, with changing numbers of levels and of anchors in them."""
    matcher = mg_ops.AtssMatcher(backend=target.backend)
    torch._dynamo.reset()
    compiled = torch.compile(matcher.__call__, fullgraph=True, backend="aot_eager")
    image = random_image(0)
    objects = [image.gt_boxes.to(target.device)], [image.gt_labels.to(target.device)]
    for sizes in ([None, None], [70, 20], [64, 30, 9]):
        levels = [level[:size].to(target.device) for level, size in zip(image.levels, sizes, strict=False)]
        assert_same_match(compiled(levels, *objects), matcher(levels, *objects), sizes)


@pytest.mark.parametrize(
    ("level_sizes", "message"),
    [
        (None, r"^level_sizes: expected the number of anchors of each level, or .*got one tensor"),
        ([3, 1], "^level_sizes: expected a sum of 5, the number of anchors, got 4"),
        ([3, 3], "^level_sizes: expected"),
        ([], "^level_sizes: expected a sum of 5"),
    ],
)
def test_sizes_that_do_not_fit_the_anchors_raise(target: Target, level_sizes: list[int] | None, message: str) -> None:
    anchors = torch.zeros(5, 4, device=target.device)
    no_objects = [torch.zeros(0, 4, device=target.device)], [torch.zeros(0, device=target.device).long()]
    with pytest.raises((ValueError, RuntimeError), match=message):
        mg_ops.atss_match(anchors, *no_objects, level_sizes=level_sizes, backend=target.backend)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level_sizes": 5}, TypeError, "^level_sizes: expected a list of numbers of anchors, one a level, got int"),
        ({"level_sizes": torch.tensor([1])}, TypeError, "^level_sizes: expected a list"),
        (
            {"level_sizes": [1, True]},
            TypeError,
            r"^level_sizes\[1\]: expected an integer from 0 to 2147483647, got bool",
        ),
        (
            {"level_sizes": [0.5, 0.5]},
            TypeError,
            r"^level_sizes\[0\]: expected an integer from 0 to 2147483647, got float",
        ),
        ({"level_sizes": [2, -1]}, ValueError, r"^level_sizes\[1\]: expected an integer from 0 to 2147483647, got -1"),
        ({"level_sizes": [0] * 16 + [1]}, ValueError, "^level_sizes: expected at most 16 levels, got 17"),
        ({"k": 0}, ValueError, "^k: expected an integer from 1 to 128, got 0"),
        ({"k": 129}, ValueError, "^k: expected an integer from 1 to 128, got 129"),
        ({"k": 9.0}, TypeError, "^k: expected an integer from 1 to 128, got float"),
        ({"center_margin": -0.1}, ValueError, "^center_margin: expected None or a finite number of at least 0"),
        ({"center_margin": float("inf")}, ValueError, "^center_margin: expected None or a finite number"),
        ({"center_margin": False}, TypeError, "^center_margin: expected a number"),
        ({"crowd_overlap": 0}, ValueError, "^crowd_overlap: expected a threshold"),
    ],
)
def test_a_wrong_option_raises(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mg_ops.AtssMatcher(**options)
    with pytest.raises(error, match=message):
        mg_ops.atss_match([torch.zeros(1, 4)], [torch.zeros(0, 4)], [torch.zeros(0).long()], **options)


def test_wrong_anchors_are_named(target: Target) -> None:
    no_objects = [torch.zeros(0, 4, device=target.device)], [torch.zeros(0, device=target.device).long()]
    for anchors, message in [
        ([], "^anchors: expected one tensor, or one tensor per feature level, got none"),
        ([torch.zeros(3, 4, device=target.device), None], r"^anchors\[1\]: expected"),
        ([torch.zeros(3, device=target.device)], r"^anchors\[0\]: expected shape"),
        (None, "^anchors: expected"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            mg_ops.atss_match(anchors, *no_objects, backend=target.backend)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Pyramids: groups of anchors are left out that lie too far from an object


class Image(NamedTuple):
    """One image."""

    levels: list[Tensor]  # (A, 4) each
    gt_boxes: Tensor  # (G, 4)
    k: int

    @property
    def anchors(self) -> Tensor:
        return torch.cat(self.levels)

    @property
    def sizes(self) -> list[int]:
        return [len(level) for level in self.levels]

    @property
    def gt_labels(self) -> Tensor:
        return torch.zeros(len(self.gt_boxes), dtype=torch.int64)


def random_image(seed: int, size: int = 256) -> Image:
    """Anchors as detectors lay them, one or several a location, and objects of all sizes, a third of whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    per_location, base = [1, 1, 3, 9][seed % 4], [4.0, 8.0][seed // 2 % 2]
    levels = []
    for stride in (8, 16, 32, 64):
        y, x = torch.meshgrid(*[(torch.arange(math.ceil(size / stride)) + 0.5) * stride] * 2, indexing="ij")
        half = base * stride * 2 ** (torch.arange(per_location) / 3).reshape(1, -1, 1) / 2
        center = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
        levels.append(torch.cat([center - half, center + half], dim=-1).reshape(-1, 4))
    count = int(torch.randint(1, 30, (), generator=generator))
    side = 8 * torch.exp(3 * torch.rand(count, 2, generator=generator))
    center = torch.rand(count, 2, generator=generator) * size
    gt_boxes = torch.cat([center - side / 2, center + side / 2], dim=1).clamp(0, size)
    if seed % 3 == 0:
        gt_boxes = (gt_boxes / 4).round() * 4
    gt_boxes = gt_boxes[(gt_boxes[:, 2:] > gt_boxes[:, :2]).all(1)]
    return Image(levels, gt_boxes, 9 if seed % 8 < 4 else 4 * per_location)


def match_of(image: Image, target: Target, **options: Any) -> mg_ops.Match:
    return mg_ops.atss_match(
        [level.to(target.device) for level in image.levels],
        [image.gt_boxes.to(target.device)],
        [image.gt_labels.to(target.device)],
        k=image.k,
        backend=target.backend,
        **options,
    )


def test_levels_come_as_a_list_or_as_sizes(target: Target) -> None:
    image = random_image(1)
    image = image._replace(levels=[image.levels[0], torch.zeros(0, 4), *image.levels[1:]])
    anchors, objects = image.anchors.to(target.device), [image.gt_boxes.to(target.device)]
    no_labels = [image.gt_labels.to(target.device)]
    wanted = match_of(image, target)
    for level_sizes in (image.sizes, tuple(image.sizes), torch.Size(image.sizes)):
        matcher = mg_ops.AtssMatcher(level_sizes=level_sizes, backend=target.backend)
        assert_same_match(matcher(anchors, objects, no_labels), wanted)
        assert matcher.level_sizes == tuple(image.sizes)
        assert hash(matcher) == hash(mg_ops.AtssMatcher(level_sizes=tuple(image.sizes), backend=target.backend))
    one_level = mg_ops.atss_match(anchors, objects, no_labels, level_sizes=[len(anchors)], backend=target.backend)
    assert not torch.equal(one_level.cls_match, wanted.cls_match)


def test_pyramids(compiled_target: Target) -> None:
    for seed in range(fuzz_cases(24)):
        image = random_image(seed)
        expected = match_of(image, Target("eager", "cpu"))
        assert_same_match(match_of(image, compiled_target), expected, f"seed {seed}")


@pytest.mark.parametrize(
    ("level_sizes", "error", "message"),
    [
        ([3], ValueError, "^level_sizes: expected a sum of 2, the number of anchors, got 3 of 1 levels"),
        ([2**63], ValueError, r"^level_sizes\[0\]: expected an integer from 0 to 2147483647, got 9223372036854775808"),
        (b"\x02", TypeError, "^level_sizes: expected a list of numbers of anchors, one a level, got bytes"),
        ([2.0], TypeError, r"^level_sizes\[0\]: expected an integer from 0"),
    ],
)
def test_wrong_level_sizes_say_so(target: Target, level_sizes: Any, error: type[Exception], message: str) -> None:
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0]], device=target.device)
    objects = [anchors[:1]], [torch.zeros(1, dtype=torch.int64, device=target.device)]
    with pytest.raises(error, match=message):
        mg_ops.atss_match(anchors, *objects, level_sizes=level_sizes, backend=target.backend)
    sizes = np.array([2])
    match = mg_ops.atss_match(anchors, *objects, level_sizes=list(sizes), k=np.int64(2), backend=target.backend)
    assert match.cls_match.shape == (1, 2)


def test_crowded_pyramids(compiled_target: Target) -> None:
    for seed in range(fuzz_cases(30)):
        arguments = arguments_of("atss_match", pyramid_batch(seed)) | {"k": [1, 9, 40, 128][seed % 4]}
        expected = mg_ops.atss_match(**arguments, backend="eager")
        match = mg_ops.atss_match(**to_device(arguments, compiled_target.device), backend=compiled_target.backend)
        assert_same_match(match, expected, f"seed {seed}")


@pytest.mark.parametrize("threads", [32, 64])
def test_pyramids_by_the_cuda_kernels(threads: int) -> None:
    """More groups than a warp has lanes, in a level that a warp of one or of several searches."""
    emulator = emulated.build(threads=threads)
    for seed in range(fuzz_cases(4)):
        image = random_image(seed)
        image = image._replace(gt_boxes=image.gt_boxes[:5], k=[9, 36, 128, 1][seed % 4])
        arguments = image.levels, [image.gt_boxes], [image.gt_labels]
        match = emulator.run("atss_match", mg_ops.atss_match, *arguments, k=image.k, seed=seed)
        assert_same_match(match, match_of(image, Target("eager", "cpu")), f"seed {seed}")


def test_a_level_of_many_anchors(compiled_target: Target) -> None:
    """More groups than the bounds of which are at hand at a time, in rows, in columns and in no order."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(210.0), indexing="ij")
    corner = torch.stack([x, y], dim=-1)
    for order in (corner, corner.transpose(0, 1), corner.reshape(-1, 2)[torch.randperm(42_000, generator=generator)]):
        level = torch.cat([order.reshape(-1, 2), order.reshape(-1, 2) + 3.0], dim=1)
        center = torch.rand(9, 2, generator=generator) * 200
        for k in (9, 128):
            image = Image([level[:40_000], level[40_000:]], torch.cat([center - 4, center + 4], dim=1), k)
            assert_same_match(match_of(image, compiled_target), match_of(image, Target("eager", "cpu")), k)


# ---------------------------------------------------------------------------------------------------------------------
# The libraries' own


def count_differences(image: Image, match: Tensor, wanted: Tensor, what: str) -> int:
    """How many labels differ; AssertionError where no near tie explains one."""
    tied = upstream.near_ties_of_atss(image.anchors, image.sizes, image.gt_boxes, image.k)
    assert upstream.count_unexplained(match, wanted, tied, image.anchors, image.gt_boxes) == 0, what
    return int((match != wanted).sum())


def compare(
    target: Target, assign: Callable[[Image], Tensor], seeds: range, options: dict[str, Any], most: float
) -> None:
    """Compares with the labels (A,) that a library gives; at most this share of its positives may be near ties."""
    positives = differ = 0
    for seed in seeds:
        image = random_image(seed)
        wanted = assign(image)
        match = match_of(image, target, **options).cls_match[0].cpu()
        differ += count_differences(image, match, wanted, f"seed {seed}")
        positives += int((wanted >= 0).sum())
    assert positives > 20 * len(seeds) and differ < most * positives, f"{differ} of {positives} differ"


@pytest.fixture(scope="module")
def mmdet() -> Callable[[Image], Tensor]:
    try:
        make = upstream.mmdet_assigners()["ATSSAssigner"]
    except ImportError as error:
        pytest.skip(str(error))

    def assign(image: Image) -> Tensor:
        objects = upstream.instances(bboxes=image.gt_boxes, labels=image.gt_labels)
        result = make(image.k).assign(upstream.instances(priors=image.anchors), image.sizes, objects)
        return upstream.labels_of_mmdet(result.gt_inds)

    return assign


def test_mmdetections_assigner(target: Target, mmdet: Callable[[Image], Tensor]) -> None:
    compare(target, mmdet, range(fuzz_cases(60)), {}, most=0.05)


def test_mmdetections_assigner_without_ties(target: Target, mmdet: Callable[[Image], Tensor]) -> None:
    """One anchor a location: between objects of random numbers hardly two distances tie, and no label differs."""
    compare(target, mmdet, range(1, fuzz_cases(120), 12), {}, most=1e-9)


def test_mmdetections_assigner_depends_on_the_order_of_the_anchors(mmdet: Callable[[Image], Tensor]) -> None:
    """Where near ties say so and nowhere else, as the differences from ours."""
    differ = 0
    for seed in range(fuzz_cases(60)):
        image = random_image(seed)
        backward = mmdet(image._replace(levels=[level.flip(0) for level in image.levels]))
        forward = torch.cat([labels.flip(0) for labels in backward.split(image.sizes)])
        differ += count_differences(image, forward, mmdet(image), f"seed {seed}")
    assert differ > 0


@pytest.mark.parametrize("center_in_gt", [True, False])
def test_monais_matcher(target: Target, center_in_gt: bool) -> None:
    """Where levels have at least k locations, and candidates overlap the object."""
    monai = pytest.importorskip("monai.apps.detection.utils.ATSS_matcher", exc_type=ImportError)

    def assign(image: Image) -> Tensor:
        matcher = monai.ATSSMatcher(num_candidates=image.k, center_in_gt=center_in_gt)
        return matcher(image.gt_boxes, image.anchors, image.sizes, 1)[1]

    options = {} if center_in_gt else {"center_margin": None}
    compare(target, assign, range(fuzz_cases(60)), options, most=0.05)
