"""detectron2's RetinaNet trains by mutual guidance after one line, and by max-IoU matching as detectron2 does."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mg_ops
from detector.program import process_group
from mg_ops.adapters.detectron2 import use_mutual_guidance

SIZE = 64


class Recorded:
    """What the adapter touches of a RetinaNet: two levels of two anchors, and a loss that keeps what it is given."""

    num_classes = 2
    box2box_transform = SimpleNamespace(weights=(1.0, 1.0, 1.0, 1.0), scale_clamp=4.0)
    loss_normalizer = 100.0

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], list[Tensor]]] = []

    def label_anchors(self) -> None:
        raise AssertionError("the adapter labels the anchors")

    def _transpose_dense_predictions(self, predictions: Any, dims_per_anchor: list[int]) -> Any:
        assert dims_per_anchor == [self.num_classes, 4]
        return predictions

    def anchor_generator(self, features: Any) -> Any:
        boxes = torch.tensor(
            [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 9.0, 5.5], [40.0, 40.0, 50.0, 50.0]]
        )
        return [SimpleNamespace(tensor=boxes[:2]), SimpleNamespace(tensor=boxes[2:])]

    def losses(self, anchors: Any, logits: Any, gt_labels: list[Tensor], deltas: Any, gt_boxes: list[Tensor]) -> Any:
        self.calls.append(([labels.tolist() for labels in gt_labels], gt_boxes))
        self.loss_normalizer += len(self.calls)
        number = float(len(self.calls))
        return {"loss_cls": torch.tensor(number), "loss_box_reg": torch.tensor(10 * number)}


def train(model: Any) -> dict[str, Tensor]:
    """One step on two images: one with an object of class 1, one without objects."""
    boxes = [torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.zeros(0, 4)]
    classes = [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)]
    objects = [
        SimpleNamespace(gt_boxes=SimpleNamespace(tensor=box), gt_classes=label)
        for box, label in zip(boxes, classes, strict=True)
    ]
    predictions = [torch.zeros(2, 2, 2)] * 2, [torch.zeros(2, 2, 4)] * 2
    found: dict[str, Tensor] = model.forward_training(None, None, predictions, objects)
    return found


def test_each_loss_is_called_for_the_labels_of_its_task() -> None:
    model = use_mutual_guidance(Recorded())
    losses = train(model)
    # IoU 1, 0.9, 0.495 and 0: two positives and one ignored, -1; 2 is the background.
    (of_classes, _), (of_boxes, boxes) = model.calls
    assert of_classes == [[1, 1, -1, 2], [2, 2, 2, 2]]
    assert of_boxes == [[1, 1, 2, 2], [2, 2, 2, 2]]
    assert boxes[0][:2].tolist() == [[0.0, 0.0, 10.0, 10.0]] * 2
    assert losses == {"loss_cls": torch.tensor(1.0), "loss_box_reg": torch.tensor(20.0)}
    assert model.match.num_pos.tolist() == [2]


def test_each_task_has_its_own_running_mean() -> None:
    model = use_mutual_guidance(Recorded())
    train(model)
    assert (model.loss_normalizer, model.loc_loss_normalizer) == (101.0, 102.0)
    train(model)
    assert (model.loss_normalizer, model.loc_loss_normalizer) == (104.0, 106.0)


def test_one_label_for_both_tasks_is_one_call() -> None:
    model = use_mutual_guidance(Recorded(), mg_ops.MaxIouMatcher())
    losses = train(model)
    assert [labels for labels, _ in model.calls] == [[[1, 1, -1, 2], [2, 2, 2, 2]]]
    assert losses == {"loss_cls": torch.tensor(1.0), "loss_box_reg": torch.tensor(10.0)}


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model: expected detectron2's RetinaNet, got Linear; if this wraps one"):
        use_mutual_guidance(nn.Linear(1, 1))


def needs_detectron2() -> Any:
    """Its module of configurations; skips where it is not installed."""
    return pytest.importorskip("detectron2.config", reason="detectron2 is not installed")


def small_retinanet() -> nn.Module:
    """detectron2's own, of the smallest ResNet that it has."""
    config = needs_detectron2().get_cfg()
    from detectron2.modeling import build_model

    config.MODEL.DEVICE = "cpu"
    config.MODEL.META_ARCHITECTURE = "RetinaNet"
    config.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    config.MODEL.RESNETS.DEPTH = 18
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    config.MODEL.ANCHOR_GENERATOR.SIZES = [[side, 1.26 * side, 1.59 * side] for side in (8, 16, 32, 64, 128)]
    config.MODEL.RETINANET.NUM_CLASSES = 3
    torch.manual_seed(0)
    return build_model(config).train()


def small_batch(num_objects: int = 2, size: int = SIZE) -> list[dict[str, Any]]:
    """Two images; the second has no objects."""
    needs_detectron2()
    from detectron2.structures import Boxes, Instances

    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[3.0, 4.0, 20.0, 22.0], [30.0, 33.0, 61.0, 60.0]])
    batch = []
    for count in (num_objects, 0):
        objects = Instances((size, size), gt_boxes=Boxes(boxes[:count]), gt_classes=torch.tensor([0, 2])[:count])
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": objects})
    return batch


def losses_and_gradients(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    from detectron2.utils.events import EventStorage

    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.mark.filterwarnings("ignore")
def test_max_iou_matching_has_detectron2s_losses_and_gradients() -> None:
    model = small_retinanet()
    guided = use_mutual_guidance(copy.deepcopy(model), mg_ops.MaxIouMatcher())
    expected, expected_gradients = losses_and_gradients(model, small_batch())
    losses, gradients = losses_and_gradients(guided, small_batch())
    assert losses["loss_cls"] > 0 and losses["loss_box_reg"] > 0
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "matcher",
    [None, mg_ops.DynamicMutualMatcher(), mg_ops.TaskAlignedMatcher(), mg_ops.SimOtaMatcher(), mg_ops.AtssMatcher()],
)
def test_every_rule_trains(matcher: Any) -> None:
    model = use_mutual_guidance(small_retinanet(), matcher)
    losses, gradients = losses_and_gradients(model, small_batch())
    assert all(loss > 0 for loss in losses.values()) and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_without_objects_trains() -> None:
    model = small_retinanet()
    expected, _ = losses_and_gradients(copy.deepcopy(model), small_batch(0))
    losses, _ = losses_and_gradients(use_mutual_guidance(model), small_batch(0))
    torch.testing.assert_close(losses, expected)
    assert losses["loss_box_reg"] == 0


@pytest.mark.filterwarnings("ignore")
def test_parameters_inference_and_copies_stay_as_they_are() -> None:
    plain = small_retinanet()
    guided = use_mutual_guidance(copy.deepcopy(plain))
    assert plain.state_dict().keys() == guided.state_dict().keys()
    duplicate = pickle.loads(pickle.dumps(guided))
    first = losses_and_gradients(guided, small_batch())[0]
    assert losses_and_gradients(duplicate, small_batch())[0] == first
    with torch.no_grad():
        found, expected = (model.eval()(small_batch())[0]["instances"] for model in (guided, plain))
    assert torch.equal(found.scores, expected.scores) and torch.equal(
        found.pred_boxes.tensor, expected.pred_boxes.tensor
    )


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_autocast_trains() -> None:
    # Of smaller images P6 is one cell, of which torch's gradient of a convolution in bfloat16 is not always a number.
    batch = small_batch(size=2 * SIZE)
    expected, _ = losses_and_gradients(use_mutual_guidance(small_retinanet()), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = losses_and_gradients(use_mutual_guidance(small_retinanet()), batch)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_model_is_the_eager_one() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(use_mutual_guidance(small_retinanet()), backend="aot_eager")
    model = use_mutual_guidance(small_retinanet())
    for num_objects in (2, 0):
        losses, gradients = losses_and_gradients(compiled, small_batch(num_objects))
        expected, expected_gradients = losses_and_gradients(model, small_batch(num_objects))
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def train_one_rank(rank: int, rendezvous: str) -> None:
    """One of two processes, each with one of the two images; the averaged gradients are those of each alone."""
    torch.set_num_threads(1)
    with process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2):
        alone = [losses_and_gradients(use_mutual_guidance(small_retinanet()), [image])[1] for image in small_batch()]
        model = nn.parallel.DistributedDataParallel(use_mutual_guidance(small_retinanet()))
        _, gradients = losses_and_gradients(model, small_batch()[rank : rank + 1])
        averages = [(with_objects + without) / 2 for with_objects, without in zip(*alone, strict=True)]
        torch.testing.assert_close(gradients, averages, rtol=1e-4, atol=1e-6)
        assert all(gradient.any() for gradient in alone[0])
        assert len(model.module.match.num_pos) == (2, 0)[rank]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_average_their_gradients_also_when_one_has_no_objects(tmp_path: Path) -> None:
    needs_detectron2()
    torch.multiprocessing.spawn(train_one_rank, args=(str(tmp_path / "rendezvous"),), nprocs=2)
