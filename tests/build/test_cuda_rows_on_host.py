"""The row kernels of csrc/cuda, run on the CPU by cuda_host.h, against torch's indexing."""

import ctypes

import pytest
import torch

import cuda_kernels as ck

pytestmark = pytest.mark.skipif(bool(ck.WHY_NOT), reason=ck.WHY_NOT)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    target = tmp_path_factory.mktemp("cuda_host") / "rows.so"
    return ck.load(ck.compile_host(target, sources=[ck.ROOT / "csrc/cuda/rows.cu"]))


def call(kernel, source, index, count, y, *more):
    pointers = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (source, index, count, y)]
    sizes = [ctypes.c_int64(v) for v in (y.shape[0] if more[0] is None else more[0], len(index), more[1])]
    assert kernel(*pointers, *sizes, *more[2:], 0, None) == 0


@pytest.mark.parametrize("dtype, d", [(torch.float32, 40), (torch.bfloat16, 7), (torch.float16, 96)], ids=str)
@pytest.mark.parametrize("count", [None, 0, 5, 20])
def test_gather_and_scatter(kernels, dtype, d, count):
    x, index = torch.randn(13, d).to(dtype), torch.randperm(13)[:9]
    kept = 9 if count is None else min(count, 9)
    device_count = None if count is None else torch.tensor([count])
    if count is not None:
        index[kept:] = 1 << 40  # behind the count anything may stand
    y, check = ck.guarded((9, d), dtype)
    bytes_ = d * x.element_size()
    call(kernels["gather_rows"], x, index, device_count, y, 13, bytes_)
    want = torch.zeros(9, d, dtype=dtype)
    want[:kept] = x[index[:kept]]
    assert torch.equal(y, want)
    check()

    for rows in (torch.randn(9, d).to(dtype), None):
        base, check = ck.guarded((13, d), dtype)
        base.copy_(x)
        call(kernels["scatter_rows"], rows, index, device_count, base, None, bytes_)
        want = x.clone()
        want[index[:kept]] = 0 if rows is None else rows[:kept]
        assert torch.equal(base, want)
        check()


@pytest.mark.parametrize("dtype", ck.DTYPES, ids=str)
@pytest.mark.parametrize("n, m, count", [(70, 300, None), (70, 300, 260), (5, 3, 0)])
def test_repeated_rows_are_added_in_order(kernels, monkeypatch, dtype, n, m, count):
    d = 300  # more columns than threads
    rows, index = torch.randn(m, d).to(dtype), torch.randint(n, (m,))
    kept = m if count is None else count
    index[kept:] = -1
    y, check = ck.guarded((n, d), torch.float32)
    arguments = (rows, index, None if count is None else torch.tensor([count]), y, None, d, ck.DTYPES[dtype])
    call(kernels["add_rows"], *arguments)
    check()
    want = torch.zeros(n, d)
    for i in range(kept):
        want[index[i]] += rows[i].float()
    assert torch.equal(y, want)
    monkeypatch.setenv("CUDA_HOST_REVERSE", "1")
    again = y.clone()
    call(kernels["add_rows"], *arguments)
    assert torch.equal(y, again)
