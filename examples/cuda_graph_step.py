"""A whole training step as one CUDA graph: forward, matching, losses, backward and optimizer.

    python examples/cuda_graph_step.py --steps 200

Images have different numbers of objects: they are padded to a fixed capacity, and `gt_offsets` says how many count.
Before each replay a batch is copied into the memory that the graph reads. One with more objects than there is room for
is known by its shape, and runs eagerly. The detector is that of `plain_loop.py`.
"""

from __future__ import annotations

import argparse

import torch
from plain_loop import IMAGE_SIZE, ToyDetector, make_batch, training_loss
from torch import Tensor

CAPACITY = 16


def pack(images: Tensor, gt_boxes: list[Tensor], gt_labels: list[Tensor]) -> list[Tensor]:
    """Images, boxes (N, 4), labels (N,) and offsets (B + 1,); N is the capacity, or the number of objects above it."""
    counts = [len(boxes) for boxes in gt_boxes]
    padding = max(0, CAPACITY - sum(counts))
    boxes = torch.cat([*gt_boxes, torch.zeros(padding, 4)])
    labels = torch.cat([*gt_labels, torch.zeros(padding, dtype=torch.int64)])
    return [images, boxes, labels, torch.tensor([0, *counts]).cumsum(0)]


def main() -> None:
    """Takes three steps, captures the next one, and trains by replaying it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: a CUDA graph needs one (torch.cuda.is_available() is false)")

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = ToyDetector().cuda()
    lr = torch.tensor(2e-3, device="cuda")  # read by the graph, so that it can change
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=True)

    def step(images: Tensor, *objects: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits, deltas = model(images)
        loss, _ = training_loss(logits, deltas, model.anchors, *objects)
        loss.backward()
        optimizer.step()
        return loss.detach()

    nothing = [torch.zeros(0, 4)] * arguments.batch_size, [torch.zeros(0, dtype=torch.int64)] * arguments.batch_size
    buffers = [part.cuda() for part in pack(torch.zeros(arguments.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), *nothing)]
    graph, stream, num_eager = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0
    captured: Tensor | None = None
    for index in range(1, arguments.steps + 1):
        lr.fill_(2e-3 * (1 - index / (arguments.steps + 1)))
        batch = pack(*make_batch(arguments.batch_size, generator))
        if len(batch[1]) > CAPACITY:
            num_eager += 1
            loss = step(*(part.cuda() for part in batch))
        else:
            for buffer, part in zip(buffers, batch, strict=True):
                buffer.copy_(part)
            if index <= 3:  # what is made on first use (kernels, optimizer state) must exist before the capture
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    loss = step(*buffers)
                torch.cuda.current_stream().wait_stream(stream)
            else:
                if captured is None:
                    with torch.cuda.graph(graph, stream=stream):
                        captured = step(*buffers)
                graph.replay()
                loss = captured
        if index == 1 or index % 20 == 0 or index == arguments.steps:
            print(f"step {index}: loss {loss.item():.3f}, {num_eager} so far run eagerly")


if __name__ == "__main__":
    main()
