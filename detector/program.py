"""What the command lines have in common: how they end, and the limits of their options."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from detector import end_at_once
from detector.anchors import level_cells
from detector.data import FORMATS


def explain(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Below the first line of torch's own errors come advice to its developers and addresses in its library.
    return lines[0] if isinstance(error, RuntimeError) else "; ".join(lines)


def is_first_to_fail() -> bool:
    """Under torchrun: whether no other process has failed before; those that lose their peer need not say so."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    try:
        return bool(torch.distributed.distributed_c10d._get_default_store().add("detector/failed", 1) == 1)
    except (RuntimeError, ValueError, AttributeError):
        return True


@contextlib.contextmanager
def process_group(backend: str, **options: Any) -> Iterator[None]:
    """torch.distributed's default group, by `init_process_group`, and at the end of the block none of its threads.

    A thread of Gloo that lets go of a tensor while Python ends aborts the process (pytorch/pytorch#190489). These
    threads end with the last reference to the group, which DistributedDataParallel holds too. After an error they are
    left alone: what they wait for may never come.
    """
    # Its functions take the group there is as a default, and keep it: DDP imports it later, when there is one.
    import torch.distributed.nn

    torch.distributed.init_process_group(backend, **options)
    try:
        yield
    except SystemExit as stop:
        traceback.clear_frames(stop.__traceback__)
        leave_process_group()
        raise
    leave_process_group()


def leave_process_group() -> None:
    """Frees what a finished training left, then the group."""
    gc.collect()
    torch.distributed.destroy_process_group()


def exit_by_signal(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process through every `finally`, as Ctrl-C does."""
    sys.exit(128 + signal_number)


def run_program(main: Callable[[], object]) -> NoReturn:
    """Runs a command line and ends the process.

    Its exit status is 0; 1 if `main` returns an integer that is not 0, or after an error in running; 2 after an error
    that the user can mend (ValueError, OSError, ImportError); 128 and the signal's number after SIGTERM or SIGINT, once
    `main` has tidied up. These errors are one line on stderr; `python -X dev` shows where they come from.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any file name can be printed
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "RANK" not in os.environ:  # under torchrun a process that waits for another would not come to the handler
        signal.signal(signal.SIGTERM, exit_by_signal)
    problem: Exception
    try:
        result = main()
    except (ValueError, OSError, ImportError) as error:
        problem, status = error, 2
    except (FloatingPointError, RuntimeError, MemoryError) as error:
        problem, status = error, 1
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    else:
        sys.exit(1 if isinstance(result, int) and result else 0)
    if sys.flags.dev_mode:
        raise problem
    if is_first_to_fail():
        spec = sys.modules["__main__"].__spec__
        print(f"python -m {spec.name if spec else '?'}: error: {explain(problem)}", file=sys.stderr, flush=True)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Values of options, as argparse's `type`.


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A whole number within limits."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest or (highest is not None and value > highest):
            upward = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"expected a whole number, {upward}, got {text!r}")
        return value

    return convert


def real_number(
    lowest: float, highest: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """A finite number within limits; `above` and `below` leave the limits themselves out."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        fits = (lowest < value if above else lowest <= value) and (value < highest if below else value <= highest)
        if not (math.isfinite(value) and fits):
            limits = f"{'above ' if above else ''}{lowest:g}{'' if above else ' or more'}"
            if highest < math.inf:
                limits += f" and {'below' if below else 'at most'} {highest:g}"
            raise argparse.ArgumentTypeError(f"expected a number, {limits}, got {text!r}")
        return value

    return convert


def input_side(text: str) -> int:
    """The side of a network's input in pixels."""
    try:
        value = int(text)
        level_cells(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32, at least 64, got {text!r}") from None
    return value


def device_name(text: str) -> str:
    """cpu, cuda or cuda:N, if it is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:NUMBER, got {text!r}")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(
            f"torch sees {count or 'no'} CUDA device{'s' * (count != 1)} here, got {text!r}"
        )
    return text


def default_device() -> str:
    """cuda where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_data_arguments(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """--data and --format."""
    parser.add_argument("--data", type=Path, required=required, help="folder of the data set")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="how it is laid out; auto: by its files")
