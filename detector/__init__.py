"""FSSD, RetinaNet and RFBNet trained with Mutual Guidance: the reference training system around `mg_ops`.

It runs from the checkout: `python -m detector.train --help`, and `evaluate`, `detect`, `export`, `visualize`,
`reproduce` and `download` beside it. In Python, `detector.Detector.load(checkpoint)(images)`.
"""

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detector.inference import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    """`Detector`, with all that it imports, when it is first asked for."""
    if name == "Detector":
        from detector.inference import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def end_at_once(signal_number: int, frame: object) -> None:
    """Ends the process: while a program imports what it needs, there is nothing to save."""
    os._exit(128 + signal_number)


# In `python -m detector.train` this package is imported first. For seconds torch and others follow, in which Ctrl-C
# would show a traceback, or be lost where an import takes it for an error of its own. `run_program` ends this.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
