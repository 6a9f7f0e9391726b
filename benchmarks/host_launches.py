"""Lets a process without a GPU run the Python of one that has it: host.py --launches."""

import torch
import triton

from fastpetl import _by_torch, backends
from fastpetl.kernels import adapter, adapter_config
from fastpetl.ops import _pack

BATCH, WIDTH, BOTTLENECK = 700, 768, 96  # what a row, its width and a bottleneck stand for where sizes decide


class _Nothing:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None

    @staticmethod
    def run(*args):
        pass


def pretend(width: int) -> None:
    """Semantics: from now on tensors of the CPU, of rows that wide, are served as those of a GPU are: by the Python
    that launches Triton's kernels, but for Triton's own, and by torch. Results are whatever was in memory.
    """
    torch.Tensor.is_cpu, torch.Tensor.is_cuda = False, True
    torch.cuda.current_device = torch._C._cuda_getCurrentRawStream = lambda *device: -1  # what get_device() says here
    torch.backends.mkldnn.set_flags(False)  # which would look longer for its kernels than torch for a GPU's
    triton.runtime.JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **options: _Nothing
    backends._VERIFY["triton"] = lambda op, *_: backends._triton_kernels(op)
    for op, elsewhere in backends._ELSEWHERE.items():
        backends._AUTO[op, "cpu"] = backends._AUTO.get((op, "cuda"), (elsewhere,))
    _pack.Sample._now = lambda sample: None  # values are looked at on the CPU only
    adapter.product = lambda a, b: a.t() @ b  # no kernel for sums of fp32 here
    _by_torch.SMALL //= BATCH * WIDTH // width
    select = adapter_config.select
    adapter_config.select = lambda kind, way, d, r, rows: select(kind, way, WIDTH, BOTTLENECK, rows * BATCH)
