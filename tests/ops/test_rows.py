"""gather_rows and scatter_rows on each backend: the values, the gradients, bits, guards, compiled code."""

import pytest
import torch
from torch.library import opcheck

from fastpetl import ops
from ops.op_cases import using

BACKENDS = ["reference", "triton", "cuda"]
FUSED = BACKENDS[1:]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gathered(x, index, valid):
    y = x.new_zeros(len(index), *x.shape[1:])
    for i in range(valid):
        y[i] = x[index[i]]
    return y


def scattered(base, rows, index, valid):
    y = base.clone()
    for i in range(valid):
        y[index[i]] = rows[i]
    return y


# (n, trailing shape, kept, count): keep all, keep none, an empty index, padding behind count, one row, a wide sample
CASES = [(9, (40,), 9, None), (9, (40,), 9, 0), (5, (3,), 0, None), (300, (7,), 280, 270), (1, (768,), 1, 1)]
CASES += [(4, (3, 1130), 3, 2), (6, (), 4, 3), (0, (4,), 0, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, shape, kept, count", CASES, ids=str)
def test_values_and_gradients(backend, n, shape, kept, count):
    for dtype in DTYPES:
        base, rows = (torch.randn(k, *shape).to(dtype).requires_grad_() for k in (n, kept))
        index, valid = torch.randperm(n)[:kept], kept if count is None else count
        how_many = None if count is None else torch.tensor([count])
        if valid < kept:
            index[valid:] = index[0]  # anything
        with using("rows", backend, dtype) as name:
            y = ops.gather_rows(base, index, how_many, backend=name)
            assert torch.equal(y, gathered(base, index, valid))
            g = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, base, g)
            assert torch.equal(dx, scattered(torch.zeros_like(base), g, index, valid))
            y = ops.scatter_rows(base, rows, index, how_many, backend=name)
            assert torch.equal(y, scattered(base, rows, index, valid))
            g = torch.randn_like(y)
            dbase, drows = torch.autograd.grad(y, (base, rows), g)
            assert torch.equal(dbase, scattered(g, torch.zeros_like(rows), index, valid))
            assert torch.equal(drows, gathered(g, index, valid))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_entries_add_up(backend):
    x, index, count = torch.randn(5, 33, requires_grad=True), torch.tensor([2, 0, 2, 2, 4, 2]), torch.tensor([5])
    g = torch.randn(6, 33)
    with using("rows", backend) as name:
        dx = [torch.autograd.grad(ops.gather_rows(x, index, count, backend=name), x, g)[0] for _ in range(2)]
    want = torch.zeros(5, 33, dtype=torch.float64).index_add_(0, index[:5], g[:5].double())
    torch.testing.assert_close(dx[0].double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(*dx)


@pytest.mark.parametrize("backend", FUSED)
def test_repeated_entries_are_summed_in_fp32(backend):
    x, index = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(300, dtype=torch.int64)
    with using("rows", backend, torch.bfloat16) as name:
        (dx,) = torch.autograd.grad(ops.gather_rows(x, index, backend=name).sum(), x)
    assert not dx[0].any() and (dx[1] == 300).all()  # in bf16 the sum stops at 256


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors_and_expanded_gradients(backend):
    base, rows = torch.randn(6, 8).t().requires_grad_(), torch.randn(1, 6).expand(3, 6)
    index, count = torch.tensor([5, 0, 7, 0, 3, 0])[::2], torch.tensor([3])
    with using("rows", backend) as name:
        y = ops.scatter_rows(base, rows, index, count, backend=name)
        assert torch.equal(y, scattered(base, rows, index, 3))
        (g,) = torch.autograd.grad(y.sum() + ops.gather_rows(base, index, count, backend=name).sum(), base)
    assert torch.equal(g, torch.ones(8, 6))


@pytest.mark.parametrize("backend", FUSED)
def test_results_may_be_modified_in_place(backend):
    x = torch.randn(4, 2, 3, requires_grad=True)
    with using("rows", backend) as name:
        y = ops.gather_rows(x, torch.tensor([1, 3]), backend=name)
        y += 1
        (g,) = torch.autograd.grad(y.sum(), x)
    assert g.sum() == 12


def test_nothing_outside_the_rows_is_touched():
    """NaN rows around the tensors do not spread, padding and wrong entries of an index reach nothing."""
    pytest.importorskip("triton")
    whole = torch.full((12, 40), float("nan"))
    x = whole[4:8].copy_(torch.randn(4, 40))
    index, count = torch.tensor([3, 0, 99, -7]), torch.tensor([2])
    with using("rows", "triton") as name:
        y = ops.gather_rows(x, index, count, backend=name)
        assert torch.equal(y, gathered(x, index, 2))
        assert torch.equal(ops.scatter_rows(x, y, index, count, backend=name), x)
        assert not ops.gather_rows(x, index, backend=name)[2:].any()
        ops.scatter_rows(x, y, index, backend=name)
    assert whole[:4].isnan().all() and whole[8:].isnan().all()


@pytest.mark.parametrize("backend", FUSED)
def test_not_differentiable_twice(backend):
    x = torch.randn(4, 3, requires_grad=True)
    with using("rows", backend) as name:
        y = ops.gather_rows(x, torch.tensor([1]), backend=name)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="gather_rows: .* cannot be differentiated twice"):
            g.sum().backward()


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend):
    x, index, count = torch.randn(4, 2, 3, requires_grad=True), torch.tensor([2, 0, 1]), torch.tensor([2])
    rows = torch.randn(3, 2, 3, requires_grad=True)
    with using("rows", backend) as name:
        opcheck(torch.ops.fastpetl.gather_rows.default, (x, index, count, name))
        opcheck(torch.ops.fastpetl.gather_rows.default, (x, index, None, name))
        opcheck(torch.ops.fastpetl.scatter_rows.default, (x, rows, index, count, name))
        opcheck(torch.ops.fastpetl.scatter_rows.default, (x, None, index, count, name))


@pytest.mark.parametrize("backend", FUSED)
def test_compiled_without_recompiling(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def block(x, index, count):
        y = ops.gather_rows(x, index, count, backend=backend)
        return ops.scatter_rows(x, y * 2, index, count, backend=backend).square().sum()

    counters, graphs = torch._dynamo.utils.counters, []
    with using("rows", backend):
        for i in range(3):
            x, index = torch.randn(5 + i, 3 + i, 6, requires_grad=True), torch.randperm(5 + i)[: 3 + i]
            (got,) = torch.autograd.grad(block(x, index, torch.tensor([i])), x)
            scale = torch.ones(5 + i)
            scale[index[:i]] = 4.0
            torch.testing.assert_close(got, 2 * x.detach() * scale.view(-1, 1, 1))
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3


def test_a_backend_that_cannot_serve_says_why():
    x, index = torch.randn(3, 2, dtype=torch.float64), torch.tensor([1])
    with pytest.raises(RuntimeError, match="rows: backend is 'triton', .* the tensors are float64"):
        ops.gather_rows(x, index, backend="triton")
    with pytest.raises(ValueError, match="rows: backend is 'fast', expected auto, triton, cuda, reference"):
        ops.gather_rows(x, index, backend="fast")
