"""Mutual guidance in a plain PyTorch training loop: a toy detector learns to find colored rectangles.

    python examples/plain_loop.py --steps 200

What matters is in `training_loss`: match, targets, and the two masks that say which anchors each loss sees.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

import mg_ops

IMAGE_SIZE = 64
STRIDE = 8
ANCHOR_SIDES = (12.0, 24.0)
NUM_CLASSES = 3  # red, green, blue


class ToyDetector(nn.Module):
    """Three convolutions, and a head of 1 x 1: two square anchors at every cell of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels_out in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(64, len(ANCHOR_SIDES) * (NUM_CLASSES + 4), 1)
        nn.init.zeros_(self.head.bias)
        centers = (torch.arange(IMAGE_SIZE // STRIDE) + 0.5) * STRIDE
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        points = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        half = torch.tensor(ANCHOR_SIDES).reshape(1, -1, 1) / 2
        self.anchors: Tensor
        self.register_buffer("anchors", (points + half * torch.tensor([-1.0, -1.0, 1.0, 1.0])).reshape(-1, 4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, A, C) and regression deltas (B, A, 4)."""
        outputs = self.head(self.backbone(images)).permute(0, 2, 3, 1).reshape(len(images), -1, NUM_CLASSES + 4)
        return outputs[..., :NUM_CLASSES], outputs[..., NUM_CLASSES:]


def make_batch(batch_size: int, generator: torch.Generator) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Noisy images of none to three colored rectangles, with their boxes (x1, y1, x2, y2) in pixels and labels."""
    images = 0.2 * torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    gt_boxes, gt_labels = [], []
    for image in images:
        count = int(torch.randint(0, 4, (), generator=generator))
        corner = torch.randint(0, IMAGE_SIZE - 32, (count, 2), generator=generator)
        boxes = torch.cat([corner, corner + torch.randint(8, 32, (count, 2), generator=generator)], dim=1)
        labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            image[:, y1:y2, x1:x2] = 0.0
            image[label, y1:y2, x1:x2] = 1.0
        gt_boxes.append(boxes.float())
        gt_labels.append(labels)
    return images, gt_boxes, gt_labels


def training_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor | list[Tensor],
    gt_labels: Tensor | list[Tensor],
    gt_offsets: Tensor | None = None,
) -> tuple[Tensor, mg_ops.MutualMatch]:
    """The focal loss of classification plus the smooth L1 loss of localization, each over its own match."""
    coder = mg_ops.BoxCoder()
    match = mg_ops.mutual_match(
        anchors, gt_boxes, gt_labels, gt_offsets, cls_logits=logits, box_deltas=deltas, box_coder=coder
    )
    targets = mg_ops.encode_targets(
        match, anchors, gt_boxes, gt_labels, gt_offsets, num_classes=NUM_CLASSES, box_coder=coder
    )
    counted = targets.class_targets != mg_ops.IGNORED
    positive = match.loc_positive

    wanted = (targets.class_targets.unsqueeze(-1) == torch.arange(NUM_CLASSES, device=logits.device)).float()
    error = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    focal = error * (wanted - logits.sigmoid()).square()
    class_loss = (focal.sum(-1) * counted).sum() / match.cls_positive.sum().clamp(min=1)
    box_error = functional.smooth_l1_loss(deltas, targets.box_targets, reduction="none").sum(-1)
    box_loss = (box_error * positive).sum() / positive.sum().clamp(min=1)
    return class_loss + box_loss, match


def main() -> None:
    """Trains and prints the loss and what `mg_ops.summarize` says of the matches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = ToyDetector().to(arguments.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1, arguments.steps + 1):
        images, gt_boxes, gt_labels = make_batch(arguments.batch_size, generator)
        gt_boxes = [boxes.to(arguments.device) for boxes in gt_boxes]
        gt_labels = [labels.to(arguments.device) for labels in gt_labels]
        logits, deltas = model(images.to(arguments.device))
        loss, match = training_loss(logits, deltas, model.anchors, gt_boxes, gt_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 20 == 0 or step == arguments.steps:
            numbers = mg_ops.summarize(match, gt_boxes).as_dict()
            print(
                f"step {step}: loss {loss.item():.3f}, {numbers['objects/all']:.0f} objects, "
                f"{numbers['cls_positives_per_object/all']:.1f} positives each, "
                f"disagreement {numbers['disagreement']:.2f}"
            )


if __name__ == "__main__":
    main()
