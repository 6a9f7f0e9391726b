"""What several files of this folder compile, once."""

import pytest

import cuda_kernels as ck


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """csrc/cuda as functions of the CPU."""
    if ck.WHY_NOT:
        pytest.skip(ck.WHY_NOT)
    return ck.load(ck.compile_host(tmp_path_factory.mktemp("cuda_host") / "kernels.so"))
