"""Three launches or one: times the CUDA matching under graph replay for every size of cluster, and checks the answers.

    python benchmarks/cluster_size.py --output cluster_size.json
    python benchmarks/cluster_size.py --dry-run     # no GPU: the same kernels on the CPU, answers only

One launch lets the blocks of a cluster match an image by themselves, with barriers between the steps (sm_90 and later).
It is off unless `torch.ops.mg_ops.cuda_set_cluster_size` turns it on; what is measured here decides whether it stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks.cases import CASES, CODER, Batch, make_batches  # noqa: E402

CASE_NAMES = ("voc320", "coco320")
CLUSTER_SIZES = (0, 4, 8, 16)
"""0: three launches."""
NUM_BATCHES = 8  # one after the other in the graph, so that the L2 cache does not hold a call's inputs
REPLAYS = 60


def arguments_of(batch: Batch) -> dict[str, object]:
    """A batch as arguments of `mg_ops.mutual_match`."""
    return {
        "anchors": batch.anchors,
        "pred_boxes": batch.deltas,
        "cls_scores": batch.logits,
        "gt_boxes": batch.gt_boxes,
        "gt_labels": batch.gt_labels,
        "gt_offsets": batch.gt_offsets,
        "gt_crowd": batch.gt_crowd,
        "box_coder": CODER,
    }


def same(match: mg_ops.MutualMatch, expected: mg_ops.MutualMatch) -> bool:
    """Whether all integers are equal."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(match, expected, strict=True))


def time_graph(batches: list[Batch]) -> list[float]:
    """Device microseconds a call, one number a replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for batch in batches:
            mg_ops.mutual_match(**arguments_of(batch), backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [mg_ops.mutual_match(**arguments_of(batch), backend="cuda") for batch in batches]
    for _ in range(5):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(kept))
    return times


def measure(name: str) -> dict[str, object]:
    """Quartiles in microseconds for each cluster size."""
    batches = make_batches(CASES[name], None, NUM_BATCHES, 0, "cuda")
    expected = [mg_ops.mutual_match(**arguments_of(batch), backend="eager") for batch in batches[:2]]
    result: dict[str, object] = {}
    for cluster_size in CLUSTER_SIZES:
        before = torch.ops.mg_ops.cuda_set_cluster_size(cluster_size)
        try:
            for batch, wanted in zip(batches, expected, strict=False):
                if not same(mg_ops.mutual_match(**arguments_of(batch), backend="cuda"), wanted):
                    raise AssertionError(f"{name}: cluster size {cluster_size} gives another answer than the reference")
            result[str(cluster_size)] = statistics.quantiles(time_graph(batches), n=4)
        except RuntimeError as error:
            if cluster_size <= 8:  # what every GPU with clusters can do
                raise
            print(f"{name}: clusters of {cluster_size} blocks are not possible here: {error}")
        finally:
            torch.ops.mg_ops.cuda_set_cluster_size(before)
    return result


def verdict(name: str, result: dict[str, list[float]]) -> str:
    """Which is faster, by the medians."""
    three = result["0"][1]
    size, best = min(((size, times[1]) for size, times in result.items() if size != "0"), key=lambda pair: pair[1])
    relation = "faster" if best < three else "not faster"
    return f"{name}: three launches {three:.1f} us, one launch by {size} blocks {best:.1f} us: one launch is {relation}"


def check_on_cpu() -> None:
    """The answers of every cluster size, the kernels run on the CPU."""
    sys.path.append(str(ROOT / "tests"))
    import cuda_on_cpu

    emulator = cuda_on_cpu.build()
    for name in CASE_NAMES:
        arguments = arguments_of(make_batches(replace(CASES[name], batch_size=1), None, 1, 0, "cpu")[0])
        expected = mg_ops.mutual_match(**arguments, backend="eager")
        for cluster_size in CLUSTER_SIZES:
            match = emulator.mutual_match(**arguments, cluster_size=cluster_size)
            cuda_on_cpu.assert_same(match, expected, f"{name}, cluster size {cluster_size}")
        print(f"{name}: cluster sizes {CLUSTER_SIZES} equal the reference; times need a GPU")


def main() -> int:
    """Measures, writes and prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: answers only")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the quartiles")
    options = parser.parse_args()
    if options.dry_run:
        check_on_cpu()
        return 0
    if not mg_ops.backends()["cuda"].usable:
        parser.error(f"the CUDA backend cannot be used: {mg_ops.backends()['cuda'].detail}")
    if torch.cuda.get_device_capability() < (9, 0):
        print(f"{torch.cuda.get_device_name()} has no clusters: three launches it is")
        return 0
    results = {name: measure(name) for name in CASE_NAMES}
    if options.output:
        content = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "quartiles_us": results}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    for name, result in results.items():
        print(verdict(name, result))  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
