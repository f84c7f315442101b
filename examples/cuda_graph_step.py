"""A whole training step as one CUDA graph: forward, matching, losses, backward and optimizer.

    python examples/cuda_graph_step.py --steps 200

Images have different numbers of objects: they are packed into buffers of a fixed capacity, and `gt_offsets` says how
many count. Before each replay new images and objects are copied into the same buffers. The detector is that of
`plain_loop.py`.
"""

from __future__ import annotations

import argparse

import torch
from plain_loop import IMAGE_SIZE, ToyDetector, make_batch, training_loss
from torch import Tensor

CAPACITY = 64


def pack_objects(gt_boxes: list[Tensor], gt_labels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (CAPACITY, 4), labels (CAPACITY,) and offsets (B + 1,); raises if there are more objects than capacity."""
    offsets = torch.tensor([0] + [len(boxes) for boxes in gt_boxes]).cumsum(0)
    count = int(offsets[-1])
    if count > CAPACITY:
        raise ValueError(f"gt_boxes: expected at most {CAPACITY} objects, got {count}; raise CAPACITY")
    boxes, labels = torch.zeros(CAPACITY, 4), torch.zeros(CAPACITY, dtype=torch.int64)
    boxes[:count], labels[:count] = torch.cat(gt_boxes), torch.cat(gt_labels)
    return boxes, labels, offsets


def main() -> None:
    """Captures one step, then trains by replaying it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: a CUDA graph needs one (torch.cuda.is_available() is false)")

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = ToyDetector().cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, capturable=True)
    images = torch.zeros(arguments.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device="cuda")
    boxes = torch.zeros(CAPACITY, 4, device="cuda")
    labels = torch.zeros(CAPACITY, dtype=torch.int64, device="cuda")
    offsets = torch.zeros(arguments.batch_size + 1, dtype=torch.int64, device="cuda")

    def load_batch() -> None:
        new_images, gt_boxes, gt_labels = make_batch(arguments.batch_size, generator)
        new_boxes, new_labels, new_offsets = pack_objects(gt_boxes, gt_labels)
        for buffer, new in ((images, new_images), (boxes, new_boxes), (labels, new_labels), (offsets, new_offsets)):
            buffer.copy_(new)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits, deltas = model(images)
        loss, _ = training_loss(logits, deltas, model.anchors, boxes, labels, offsets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    # What is made on first use (kernels, optimizer state, cuDNN's choices) must exist before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            load_batch()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    for index in range(1, arguments.steps + 1):
        load_batch()
        graph.replay()
        if index == 1 or index % 20 == 0 or index == arguments.steps:
            print(f"step {index}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
