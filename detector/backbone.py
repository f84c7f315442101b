"""Backbones: torchvision's ResNet-18 and VGG-16 cut into feature maps, and where their ImageNet weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

BACKBONES = ("resnet18", "vgg16", "vgg16_bn")


class Normalize(nn.Module):
    """RGB in 0..255, as decoded, to what ImageNet backbones were trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(memory_format=torch.channels_last).float() - self.mean) / self.std


class ResNet18(nn.Module):
    """Feature maps at strides 8, 16 and 32."""

    channels = (128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.normalize = Normalize()
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(images)))))
        x = self.layer1(x)  # (B, 64, S / 4, S / 4)
        stride_8 = self.layer2(x)  # (B, 128, S / 8, S / 8)
        stride_16 = self.layer3(stride_8)  # (B, 256, S / 16, S / 16)
        stride_32 = self.layer4(stride_16)  # (B, 512, S / 32, S / 32)
        return [stride_8, stride_16, stride_32]


class VGG16(nn.Module):
    """Feature maps after conv4_3 (stride 8) and conv5_3 (stride 16)."""

    channels = (512, 512)

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        # Only the convolutions: torchvision.models.vgg16() would fill 120 million weights of a classifier first.
        features = make_layers(cfgs["D"], batch_norm)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None  # make_layers leaves none out, with batch norm neither
                nn.init.zeros_(layer.bias)
        pools = [index for index, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        self.normalize = Normalize()
        self.features = features[: pools[4]]
        self.conv5_start = pools[3]

    def forward(self, images: Tensor) -> list[Tensor]:
        stride_8 = self.features[: self.conv5_start](self.normalize(images))  # (B, 512, S / 8, S / 8)
        stride_16 = self.features[self.conv5_start :](stride_8)  # (B, 512, S / 16, S / 16)
        return [stride_8, stride_16]


def make_backbone(name: str) -> ResNet18 | VGG16:
    """A backbone of BACKBONES with random weights."""
    if name == "resnet18":
        return ResNet18()
    if name in ("vgg16", "vgg16_bn"):
        return VGG16(batch_norm=name == "vgg16_bn")
    raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")


def load_backbone_weights(backbone: nn.Module, name: str, source: str) -> None:
    """Fills a backbone with pretrained weights.

    Args:
        backbone: what `make_backbone(name)` returned.
        name: its name.
        source: "imagenet" for torchvision's weights (downloaded once to torch's cache), "none" for random ones, or the
            path of a state dict in torchvision's names, of any floating dtype; the classifier layers it may have are
            left out.

    Raises:
        RuntimeError: torchvision's weights are neither in the cache nor reachable.
        ValueError: the file does not fit the backbone; the message names the first layers that do not.
    """
    if source == "none":
        return
    if source == "imagenet":
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise RuntimeError(
                f"The ImageNet weights of {name} are not in torch's cache ({torch.hub.get_dir()}/checkpoints) and "
                f"cannot be downloaded from {weights.url}: {error}. Pass --backbone-weights FILE with a state dict of "
                f"torchvision's {name}, or --backbone-weights none to start from random weights."
            ) from error
    else:
        if not Path(source).is_file():
            raise ValueError(
                f"--backbone-weights: expected 'imagenet', 'none' or a file, and there is no file {source!r}"
            )
        state = load_torch_file(Path(source), "--backbone-weights")
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"--backbone-weights: {source}: expected a state dict, tensors by name, and it is none")
    state = {key: value for key, value in state.items() if not str(key).startswith(("fc.", "classifier."))}
    misfit = describe_misfit(backbone.state_dict(), state)
    if misfit:
        raise ValueError(
            f"--backbone-weights: {source} does not fit {name}: {misfit}. "
            f"Pass a state dict of torchvision's {name}, or another --backbone ({', '.join(BACKBONES)})."
        )
    backbone.load_state_dict(state, strict=False)


def load_torch_file(path: Path, what: str, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote, if it holds nothing but tensors and plain values.

    Raises:
        ValueError: the file is something else, or cut off; begins with `what`.
        OSError: it cannot be read.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types: pickle runs whatever the bytes of the file say
        reason = str(error).partition("\n")[0]
        # torch's advice to load whatever the file says to run is none to pass on.
        reason = type(error).__name__ if not reason or "weights_only" in reason else reason
        raise ValueError(
            f"{what}: {path} cannot be read: it is not a state dict or checkpoint of torch.save, or cut off ({reason})"
        ) from error


def describe_misfit(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """How a state dict differs from the one expected, with the first names; empty if it fits."""
    missing = sorted(key for key in expected.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    unknown = sorted(map(str, state.keys() - expected.keys()))
    reshaped = sorted(key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape)
    if not (missing or unknown or reshaped):
        return ""
    return (
        f"{len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}, "
        f"{len(reshaped)} of another shape {reshaped[:3]}"
    )
