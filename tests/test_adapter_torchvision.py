"""torchvision's RetinaNet, SSD and FCOS train by mutual guidance after one line; the first two with strategy="iou" as
torchvision does."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mg_ops

pytest.importorskip("torchvision")
from torchvision import ops
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from detector.program import process_group
from mg_ops.adapters import torchvision as adapter
from mg_ops.adapters.torchvision import remove_mutual_guidance, use_mutual_guidance

Targets = list[dict[str, torch.Tensor]]
SIZE = 64


class TwoLevels(nn.Module):
    """A backbone of two convolutions: strides 8 and 16."""

    def __init__(self, out_channels: int | list[int], channels: int = 8) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.first = nn.Conv2d(3, channels, 3, stride=8, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.first(images).relu()
        return {"0": first, "1": self.second(first)}


def small_retinanet() -> RetinaNet:
    torch.manual_seed(0)
    ratios = ((0.5, 1.0, 2.0),) * 2
    return RetinaNet(
        TwoLevels(8),
        num_classes=4,
        anchor_generator=AnchorGenerator(((12, 16), (24, 40)), ratios),
        min_size=SIZE,
        max_size=SIZE,
    )


def small_ssd() -> SSD:
    torch.manual_seed(0)
    generator = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.45, 0.8])
    return SSD(TwoLevels([8, 8]), generator, (SIZE, SIZE), num_classes=4)


def small_fcos() -> FCOS:
    torch.manual_seed(0)
    generator = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    return FCOS(TwoLevels(32, 32), num_classes=4, anchor_generator=generator, min_size=SIZE, max_size=SIZE)


def small_batch() -> tuple[list[torch.Tensor], Targets]:
    """Two images of two and one objects, none of whose best anchors is another's, and one image without objects."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in range(3)]
    boxes = [[[3.0, 4.0, 20.0, 22.0], [30.0, 33.0, 61.0, 60.0]], [[10.0, 20.0, 40.0, 40.0]], []]
    labels = [[1, 3], [2], []]
    targets = [
        {"boxes": torch.tensor(box).reshape(-1, 4), "labels": torch.tensor(label, dtype=torch.int64)}
        for box, label in zip(boxes, labels, strict=True)
    ]
    return images, targets


MODELS = {"retinanet": small_retinanet, "ssd": small_ssd, "fcos": small_fcos}
WITH_ANCHORS = ["retinanet", "ssd"]


@pytest.fixture(params=MODELS)
def make_model(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return MODELS[request.param]


def with_opinions(model: nn.Module) -> nn.Module:
    """The model with a head whose boxes are far from the anchors and whose scores are far from each other."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


def losses_and_gradients(
    model: nn.Module, images: list[torch.Tensor], targets: Targets
) -> tuple[dict[str, float], Any]:
    model.train()
    model.zero_grad()
    losses = model(images, copy.deepcopy(targets))
    sum(losses.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def guide(model: nn.Module, **options: Any) -> nn.Module:
    """Mutual guidance with the model's own thresholds and these options."""
    thresholds = {}
    if not isinstance(model, FCOS):
        own = model.proposal_matcher
        thresholds = {"iou_positive": own.high_threshold, "iou_ignored": own.low_threshold}
    return use_mutual_guidance(model, mg_ops.MutualMatcher(**{**thresholds, **options}))


@pytest.mark.parametrize("name", WITH_ANCHORS)
def test_iou_strategy_has_torchvisions_losses_and_gradients(name: str) -> None:
    make_model = MODELS[name]
    images, targets = small_batch()
    expected, expected_gradients = losses_and_gradients(make_model(), images, targets)
    assert expected["classification"] > 0 and expected["bbox_regression"] > 0
    losses, gradients = losses_and_gradients(guide(make_model(), strategy="iou"), images, targets)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", WITH_ANCHORS)
def test_max_iou_matching_has_torchvisions_losses_and_gradients(name: str) -> None:
    matcher = mg_ops.MaxIouMatcher()
    if name == "ssd":
        matcher = mg_ops.MaxIouMatcher(iou_positive=0.5, iou_ignored=0.5, low_quality="take_first")
    images, targets = small_batch()
    expected, expected_gradients = losses_and_gradients(MODELS[name](), images, targets)
    losses, gradients = losses_and_gradients(use_mutual_guidance(MODELS[name](), matcher), images, targets)
    assert losses == pytest.approx(expected, rel=1e-5)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "matcher",
    [mg_ops.MaxIouMatcher(), mg_ops.TaskAlignedMatcher(), mg_ops.SimOtaMatcher(), mg_ops.DynamicMutualMatcher()],
)
def test_other_rules_train(make_model: Callable[[], nn.Module], matcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matched in one call, and image by image."""
    matches: list[Any] = []
    for shared in (True, False):
        monkeypatch.setattr(adapter, "_anchors_are_shared", lambda *_, shared=shared: shared)
        model = make_model()
        if isinstance(model, FCOS):
            with_opinions(model)  # boxes of some size, which a new head's may not have
        use_mutual_guidance(model, matcher, on_match=lambda match, _: matches.append(match))
        losses, _ = losses_and_gradients(model, *small_batch())
        assert all(loss > 0 for loss in losses.values())
    for one, other in zip(*matches, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_atss_is_told_the_levels(name: str) -> None:
    found: list[Any] = []
    model = use_mutual_guidance(
        MODELS[name](), mg_ops.AtssMatcher(), anchor_size=4.0, on_match=lambda match, _: found.append(match)
    )
    anchors: list[torch.Tensor] = []
    model.anchor_generator.register_forward_hook(lambda module, inputs, output: anchors.extend(output))
    images, targets = small_batch()
    losses_and_gradients(model, images, targets)
    num_anchors = [64 * 6, 16 * 6] if name == "retinanet" else [64, 16]
    if name == "fcos":
        center = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2
        side = 2 * (anchors[0][:, 2:] - anchors[0][:, :2])
        anchors[0] = torch.cat([center - side, center + side], dim=1)
    boxes, labels = ([target[key] for target in targets] for key in ("boxes", "labels"))
    assert torch.equal(found[0].cls_match, mg_ops.atss_match(anchors[0].split(num_anchors), boxes, labels).cls_match)


def test_fcos_has_its_own_loss_for_the_labels_of_each_task() -> None:
    """Classes by the first match, boxes and centerness by the second, and ignored anchors nowhere."""
    images, targets = small_batch()
    model = with_opinions(small_fcos())
    found: dict[str, Any] = {}
    use_mutual_guidance(model, mg_ops.MutualMatcher(sigma=1.01), on_match=lambda match, _: found.update(match=match))
    model.head.register_forward_hook(lambda module, inputs, output: found.update(outputs=output))
    model.anchor_generator.register_forward_hook(lambda module, inputs, output: found.update(anchors=output))
    losses, _ = losses_and_gradients(model, images, targets)
    match, outputs, anchors = found["match"], found["outputs"], found["anchors"]
    assert match.ignored.any() and not torch.equal(match.cls_positive, match.loc_positive)
    inside = match.loc_match.clone()
    for image, anchor in match.loc_positive.nonzero().tolist():
        x, y = ((anchors[image][anchor, :2] + anchors[image][anchor, 2:]) / 2).tolist()
        x1, y1, x2, y2 = targets[image]["boxes"][inside[image, anchor]].tolist()
        if not (x1 < x < x2 and y1 < y < y2):
            inside[image, anchor] = mg_ops.BACKGROUND
    assert not torch.equal(inside, match.loc_match)
    by_loc = model.head.compute_loss(targets, outputs, anchors, list(inside))
    assert losses["bbox_regression"] == by_loc["bbox_regression"] and losses["bbox_ctrness"] == by_loc["bbox_ctrness"]
    wanted = torch.zeros_like(outputs["cls_logits"])
    for image, anchor in match.cls_positive.nonzero().tolist():
        wanted[image, anchor, targets[image]["labels"][match.cls_match[image, anchor]]] = 1.0
    error = ops.sigmoid_focal_loss(outputs["cls_logits"], wanted)[~match.ignored].sum() / match.cls_positive.sum()
    assert losses["classification"] == pytest.approx(float(error.detach()), rel=1e-5)


def test_each_loss_takes_its_own_match(make_model: Callable[[], nn.Module]) -> None:
    """The strategies that change one match change one loss."""
    images, targets = small_batch()
    losses = {
        strategy: losses_and_gradients(
            guide(with_opinions(make_model()), strategy=strategy, sigma=1.01), images, targets
        )[0]
        for strategy in ("iou", "localize_to_classify", "classify_to_localize", "mutual")
    }
    iou, mutual = losses["iou"], losses["mutual"]
    assert losses["localize_to_classify"]["bbox_regression"] == iou["bbox_regression"]
    assert losses["classify_to_localize"]["classification"] == iou["classification"]
    assert losses["localize_to_classify"]["classification"] == mutual["classification"] != iou["classification"]
    assert losses["classify_to_localize"]["bbox_regression"] == mutual["bbox_regression"] != iou["bbox_regression"]


def test_the_batch_is_matched_as_mutual_match_says(make_model: Callable[[], nn.Module]) -> None:
    """The hook sees the match of the network's own predictions, decoded and scored as the model does."""
    images, targets = small_batch()
    model = with_opinions(make_model())
    seen: list[tuple[mg_ops.MutualMatch, Targets]] = []
    matcher = mg_ops.MutualMatcher(sigma=3.0, iou_positive=0.6, iou_ignored=0.3)
    use_mutual_guidance(model, matcher, on_match=lambda *match: seen.append(match))
    outputs: dict[str, torch.Tensor] = {}
    anchors: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda module, inputs, output: outputs.update(output))
    model.anchor_generator.register_forward_hook(lambda module, inputs, output: anchors.extend(output))
    model.train()
    model(images, targets)
    (match, seen_targets) = seen[0]
    assert len(seen) == 1 and len(anchors) == 3
    decode = model.box_coder.decode if isinstance(model, FCOS) else model.box_coder.decode_single
    boxes = torch.stack([decode(deltas, anchors[0]) for deltas in outputs["bbox_regression"].detach()])
    logits = outputs["cls_logits"].detach()
    scores = torch.logit(logits.softmax(-1)) if isinstance(model, SSD) else logits
    if isinstance(model, FCOS):  # a square of four strides
        center, half = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2, 2 * (anchors[0][:, 2:] - anchors[0][:, :2])
        anchors[0] = torch.cat([center - half, center + half], dim=1)
    expected = matcher(anchors[0], seen_targets, pred_boxes=boxes, cls_logits=scores)
    for actual, wanted in zip(match, expected, strict=True):
        assert actual.tolist() == wanted.tolist()


def test_other_anchors_for_each_image_are_matched_image_by_image(make_model: Callable[[], nn.Module]) -> None:
    """Without torchvision's own generator the anchors are compared; different ones change no result of their image."""
    images, targets = small_batch()

    class Shifted(nn.Module):
        """Moves the anchors of every image but the first one."""

        def __init__(self, generator: nn.Module) -> None:
            super().__init__()
            self.generator = generator

        def forward(self, image_list: Any, features: Any) -> list[torch.Tensor]:
            return [anchors + 3.0 * min(image, 1) for image, anchors in enumerate(self.generator(image_list, features))]

    def matches(pick: list[int], shifted: bool) -> mg_ops.MutualMatch:
        model = make_model()
        found: list[mg_ops.MutualMatch] = []
        use_mutual_guidance(model, on_match=lambda match, _: found.append(match))
        if shifted:
            model.anchor_generator = Shifted(model.anchor_generator)
        model.train()
        model([images[image] for image in pick], [dict(targets[image]) for image in pick])
        return found[0]

    both = matches([1, 0], shifted=True)
    assert both.cls_match[:1].tolist() == matches([1], shifted=False).cls_match.tolist()
    assert both.cls_match[1].tolist() != matches([0], shifted=False).cls_match[0].tolist()
    assert both.num_pos.shape == (3,)


@pytest.mark.parametrize("strategy", ["iou", "mutual"])
def test_a_batch_without_objects_trains(make_model: Callable[[], nn.Module], strategy: str) -> None:
    images, _ = small_batch()
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    expected, _ = losses_and_gradients(make_model(), images, empty)
    losses, _ = losses_and_gradients(guide(make_model(), strategy=strategy), images, empty)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses["bbox_regression"] == 0.0


def test_training_lowers_the_loss(make_model: Callable[[], nn.Module]) -> None:
    images, targets = small_batch()
    model = use_mutual_guidance(make_model())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(10):
        losses = model.train()(images, copy.deepcopy(targets))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.8 * history[0]


def test_bfloat16_autocast_trains(make_model: Callable[[], nn.Module]) -> None:
    images, targets = small_batch()
    model = use_mutual_guidance(make_model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_compiled_loss_is_the_eager_one(name: str) -> None:
    """RetinaNet's loss functions index by data, so the graph breaks there; SSD's loss is one graph."""
    images, targets = small_batch()
    expected, expected_gradients = losses_and_gradients(use_mutual_guidance(MODELS[name]()), images, targets)
    model = use_mutual_guidance(MODELS[name]())
    torch._dynamo.reset()
    model.compute_loss = torch.compile(model.compute_loss, backend="aot_eager", fullgraph=name == "ssd")
    losses, gradients = losses_and_gradients(model, images, targets)
    assert losses == pytest.approx(expected, rel=1e-5)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_is_the_eager_one(make_model: Callable[[], nn.Module]) -> None:
    images, targets = small_batch()
    expected, _ = losses_and_gradients(use_mutual_guidance(make_model()), images, targets)
    torch._dynamo.reset()
    compiled = torch.compile(use_mutual_guidance(make_model()), backend="aot_eager")
    losses = compiled.train()(images, targets)
    assert {name: float(loss.detach()) for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5)


def train_one_rank(rank: int, name: str, rendezvous: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    with process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2):
        compare_averaged_gradients(rank, name)


def compare_averaged_gradients(rank: int, name: str) -> None:
    """An image for each process, one without objects; the averaged gradients are those of the two images alone."""
    images, targets = (part[::2] for part in small_batch())
    assert len(targets[0]["labels"]) > 0 and len(targets[1]["labels"]) == 0
    alone = [
        losses_and_gradients(
            use_mutual_guidance(MODELS[name]()), images[image : image + 1], targets[image : image + 1]
        )[1]
        for image in range(2)
    ]
    model = nn.parallel.DistributedDataParallel(use_mutual_guidance(MODELS[name]()))
    losses = model.train()(images[rank : rank + 1], targets[rank : rank + 1])
    sum(losses.values()).backward()
    for key, parameter in model.module.named_parameters():
        torch.testing.assert_close(parameter.grad, (alone[0][key] + alone[1][key]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_average_their_gradients(name: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_one_rank, args=(name, str(tmp_path / "rendezvous")), nprocs=2)


def test_crowd_regions_are_ignored_where_asked(make_model: Callable[[], nn.Module]) -> None:
    images, targets = small_batch()
    targets[0]["iscrowd"] = torch.tensor([0, 1])
    matches: dict[str | None, mg_ops.MutualMatch] = {}
    for key in (None, "iscrowd"):

        def keep(match: mg_ops.MutualMatch, _: Targets, key: str | None = key) -> None:
            matches[key] = match

        use_mutual_guidance(make_model(), crowd_key=key, on_match=keep).train()(images, copy.deepcopy(targets))
    assert matches[None].num_pos[1] > 0 and (matches[None].cls_match[0] == 1).any()
    assert matches["iscrowd"].num_pos[1] == 0 and not (matches["iscrowd"].cls_match[0] == 1).any()
    assert (matches["iscrowd"].cls_match[0] == mg_ops.IGNORED).sum() > (
        matches[None].cls_match[0] == mg_ops.IGNORED
    ).sum()


def test_ignored_anchors_are_no_hard_negatives() -> None:
    """A crowd region over the whole image ignores all background: only positives are left to learn."""
    images, targets = small_batch()
    whole = torch.tensor([[-200.0, -200.0, 300.0, 300.0]])
    target = {
        "boxes": torch.cat([targets[1]["boxes"], whole]),
        "labels": torch.tensor([2, 1]),
        "iscrowd": torch.tensor([False, True]),
    }
    model = use_mutual_guidance(small_ssd(), crowd_key="iscrowd").train()
    found: dict[str, Any] = {}
    model.head.register_forward_hook(lambda module, inputs, output: found.update(output))
    use_mutual_guidance(model, crowd_key="iscrowd", on_match=lambda match, _: found.update(match=match))
    losses = model(images[1:2], [target])
    positive = found["match"].cls_match[0] == 0
    assert not (found["match"].cls_match == mg_ops.BACKGROUND).any() and positive.any()
    logits = found["cls_logits"][0][positive].detach()
    expected = nn.functional.cross_entropy(logits, torch.full((len(logits),), 2))
    assert float(losses["classification"].detach()) == pytest.approx(float(expected), rel=1e-5)


def test_evaluation_parameters_and_copies_stay_as_they_are(make_model: Callable[[], nn.Module]) -> None:
    images, targets = small_batch()
    plain, guided = make_model().eval(), use_mutual_guidance(make_model()).eval()
    assert plain.state_dict().keys() == guided.state_dict().keys()
    with torch.no_grad():
        for expected, actual in zip(plain(images), guided(images), strict=True):
            assert all(torch.equal(expected[key], actual[key]) for key in expected)
    buffer = io.BytesIO()
    torch.save(guided, buffer)
    buffer.seek(0)
    losses, _ = losses_and_gradients(guided, images, targets)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(guided), loaded):
        other.load_state_dict(guided.state_dict())
        assert losses_and_gradients(other, images, targets)[0] == losses
        for parameter in other.parameters():
            parameter.data.zero_()  # a copy computes its loss with its own parameters
        assert losses_and_gradients(other, images, targets)[0] != losses


def test_removing_gives_torchvisions_loss_back(make_model: Callable[[], nn.Module]) -> None:
    images, targets = small_batch()
    expected, _ = losses_and_gradients(make_model(), images, targets)
    model = use_mutual_guidance(use_mutual_guidance(make_model()), mg_ops.MutualMatcher(sigma=3.0))
    assert losses_and_gradients(remove_mutual_guidance(model), images, targets)[0] == expected
    assert remove_mutual_guidance(model) is model
    torch.jit.script(model)


def test_wrong_models_and_options_say_so() -> None:
    with pytest.raises(TypeError, match="expected torchvision's RetinaNet, SSD or FCOS, got Linear"):
        use_mutual_guidance(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"matcher: expected mg_ops\.MutualMatcher, another matcher or None, got str"):
        use_mutual_guidance(small_retinanet(), "mutual")
    with pytest.raises(ValueError, match="anchor_size: expected a positive number of strides, got 0"):
        use_mutual_guidance(small_fcos(), anchor_size=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
        "fcos_resnet50_fpn",
    ],
)
def test_torchvisions_own_models_take_a_training_step(name: str) -> None:
    sizes = {} if "ssd" in name else {"min_size": 96, "max_size": 96}
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4, **sizes)
    images, targets = small_batch()
    losses, gradients = losses_and_gradients(use_mutual_guidance(model), images[:2], targets[:2])
    assert all(value > 0 for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
