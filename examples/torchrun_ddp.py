"""Mutual guidance under DistributedDataParallel: nothing changes, as each process matches its own images.

    torchrun --nproc-per-node 2 examples/torchrun_ddp.py --steps 100

Uses one GPU a process where there are enough, else the CPU. The detector and its loss are those of `plain_loop.py`.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which its functions would keep as a default
from plain_loop import ToyDetector, make_batch, training_loss
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Trains in every process, and leaves torch.distributed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="images per process")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("start it by: torchrun --nproc-per-node 2 examples/torchrun_ddp.py")

    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(device, arguments.steps, arguments.batch_size)
    # The group's threads end with its last user, the model: a thread that outlives Python aborts the process.
    gc.collect()
    dist.destroy_process_group()


def train(device: torch.device, num_steps: int, batch_size: int) -> None:
    """Trains, then checks that all processes have the same parameters."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(rank)  # other images in every process
    model = DistributedDataParallel(ToyDetector().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1, num_steps + 1):
        images, gt_boxes, gt_labels = make_batch(batch_size, generator)
        logits, deltas = model(images.to(device))
        loss, _ = training_loss(
            logits,
            deltas,
            model.module.anchors,
            [boxes.to(device) for boxes in gt_boxes],
            [labels.to(device) for labels in gt_labels],
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step == 1 or step % 20 == 0 or step == num_steps):
            print(f"step {step}: loss {loss.item():.3f} (process 0)")

    checksum = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
    first = checksum.clone()
    dist.broadcast(first, src=0)
    if not torch.equal(checksum, first):
        raise SystemExit(f"process {rank}: its parameters differ from those of process 0")
    dist.barrier()
    if rank == 0:
        print(f"{dist.get_world_size()} processes, equal parameters")


if __name__ == "__main__":
    main()
