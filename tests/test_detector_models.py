"""Each detector predicts for each of its anchors, and takes the backbone weights it is given or says why not."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from detector.backbone import load_backbone_weights, make_backbone
from detector.detectors import flatten_levels, make_detector

PARAMETERS = {
    ("fssd", "resnet18"): 16_276_096,
    ("fssd", "vgg16"): 19_256_704,
    ("fssd", "vgg16_bn"): 19_265_152,
    ("retinanet", "resnet18"): 18_899_584,
    ("retinanet", "vgg16_bn"): 21_888_640,
    ("rfbnet", "vgg16"): 23_216_256,
    ("rfbnet", "vgg16_bn"): 23_224_704,
}
"""Below 512 pixels, with 20 classes."""


@pytest.mark.parametrize(("model", "backbone"), PARAMETERS)
def test_shapes_and_parameters(model: str, backbone: str) -> None:
    # Four levels, as at 320 pixels: the parameters are the same, and a small input is enough to see the shapes.
    detector = make_detector(model, backbone, 64, 20).eval()
    assert sum(parameter.numel() for parameter in detector.parameters()) == PARAMETERS[model, backbone]
    with torch.no_grad():
        cls_logits, box_deltas = detector(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    num_anchors = 6 * (64 + 16 + 4 + 1)
    assert cls_logits.shape == (2, num_anchors, 20)
    assert box_deltas.shape == (2, num_anchors, 4)
    assert detector.anchors.shape == (num_anchors, 4)


def test_a_fifth_level_from_512_pixels_on() -> None:
    detector = make_detector("fssd", "resnet18", 512, 3).eval()
    with torch.no_grad():
        cls_logits, box_deltas = detector(torch.zeros(1, 3, 512, 512))
    assert cls_logits.shape == (1, 32_736, 3)
    assert box_deltas.shape == (1, 32_736, 4)


def test_predictions_come_in_the_order_of_the_anchors() -> None:
    """Only the head of one level, one cell and one anchor is told to fire: its anchor is the one that does."""
    detector = make_detector("fssd", "resnet18", 64, 3).eval()
    level, row, column, anchor, label = 1, 2, 3, 4, 1
    maps = [torch.zeros(1, 18, cells, cells) for cells in (8, 4, 2, 1)]
    maps[level][0, anchor * 3 + label, row, column] = 1
    fired = flatten_levels(maps, 3).nonzero().tolist()
    assert fired == [[0, 6 * (64 + row * 4 + column) + anchor, label]]
    x1, y1, x2, y2 = detector.anchors[fired[0][1]].tolist()
    # Ratio 2 at twice the area: 96 x 48 at centre (56, 40), cut by the image.
    assert (x1, y1, x2, y2) == (8, 16, 64, 64)


def test_every_class_starts_at_one_percent() -> None:
    detector = make_detector("rfbnet", "vgg16_bn", 64, 4)
    for conv in detector.head.classes:
        torch.testing.assert_close(conv.bias, torch.full_like(conv.bias, -math.log(99)))
        assert 0.008 < conv.weight.std() < 0.012


def test_weights_are_kept_in_channels_last_memory() -> None:
    detector = make_detector("fssd", "resnet18", 64, 2)
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in detector.parameters()
        if parameter.dim() == 4
    )


@pytest.mark.parametrize(("model", "backbone"), [("fssd", "resnet18"), ("retinanet", "resnet18"), ("rfbnet", "vgg16")])
def test_the_network_is_one_graph_to_torch_compile(model: str, backbone: str) -> None:
    detector = make_detector(model, backbone, 64, 2).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = detector(images)
        compiled = torch.compile(detector, backend="aot_eager", fullgraph=True)(images)
    for one, other in zip(expected, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_rfbnet_refuses_a_backbone_the_paper_does_not_pair_it_with() -> None:
    with pytest.raises(ValueError, match="VGG-16"):
        make_detector("rfbnet", "resnet18", 64, 2)


def test_backbone_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torchvision.models.resnet18(num_classes=5).state_dict()
    file = tmp_path / "weights.pth"
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, file)
    backbone = make_backbone("resnet18")
    load_backbone_weights(backbone, "resnet18", str(file))
    assert backbone.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"].half().float())


def test_backbone_weights_of_another_network_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(make_backbone("vgg16").state_dict(), file)
    with pytest.raises(ValueError, match=r"does not fit vgg16_bn.*features\.1\."):
        load_backbone_weights(make_backbone("vgg16_bn"), "vgg16_bn", str(file))
    file.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a state dict"):
        load_backbone_weights(make_backbone("vgg16"), "vgg16", str(file))
    with pytest.raises(ValueError, match="there is no file"):
        load_backbone_weights(make_backbone("vgg16"), "vgg16", str(tmp_path / "absent.pth"))


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="--backbone-weights FILE"):
        load_backbone_weights(make_backbone("resnet18"), "resnet18", "imagenet")
