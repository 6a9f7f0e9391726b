"""What the tests of the C++ kernels share."""

import pytest
import torch

from fastpetl._build import extension
from ops.op_cases import needs_cpp

MODULE, _ = extension()


@pytest.fixture(params=MODULE.cpu_isas() if MODULE else [pytest.param(None, marks=needs_cpp)])
def isa(request):
    """Each instruction set this CPU has in turn; with two threads, however many the process has."""
    before, threads = MODULE.cpu_isa(), torch.get_num_threads()
    MODULE.set_cpu_isa(request.param)
    torch.set_num_threads(2)
    yield request.param
    MODULE.set_cpu_isa(before)
    torch.set_num_threads(threads)
