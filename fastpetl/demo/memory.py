"""Peak memory of this process, measured the same way for every run."""

from __future__ import annotations

import gc
import sys
from pathlib import Path


def _status_mib(field: str) -> float | None:
    """A field of Linux's /proc/self/status, in MiB; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), None)


class PeakMemory:
    """Growth of resident memory from the moment this is made to its highest point since, in MiB.

    Made after libraries and data are loaded, and before the model: what counts is the model, its gradients, the
    optimizer and what the backward keeps.  On Linux the kernel's high-water mark is reset first; where it cannot be (or
    on another system) the mark of the whole process is used, which can only overstate.
    """

    def __init__(self):
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        self.before = self._now()

    @staticmethod
    def _now() -> float:
        resident = _status_mib("VmRSS")
        return PeakMemory._high() if resident is None else resident

    @staticmethod
    def _high() -> float:
        high = _status_mib("VmHWM")
        if high is not None:
            return high
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / 2**20 if sys.platform == "darwin" else used / 1024

    def peak_mib(self) -> float:
        return self._high() - self.before
