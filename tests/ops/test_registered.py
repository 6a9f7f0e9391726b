"""The registered ops: opcheck, and torch.compile(fullgraph=True) that trains through them without recompiling."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.library import opcheck

from fastpetl import ops
from fastpetl._build import extension
from fastpetl.spec import ACTIVATIONS
from ops.op_cases import (
    ADAPTER_BACKENDS,
    LINEAR_BACKENDS,
    NAMES,
    adapter_arguments,
    call_adapter,
    using,
)


def one_cpp(labels):
    """The C++ kernels once, on the best instruction set: the registration is the same for all."""
    return list(dict.fromkeys(label.partition("-")[0] for label in labels))


def tensors(a, dtype=None):
    return tuple(a[k] for k in NAMES)


@pytest.mark.parametrize("label", one_cpp(ADAPTER_BACKENDS))
def test_opcheck_adapter(label):
    op = torch.ops.fastpetl.adapter.default
    with using("adapter", label) as name:
        opcheck(op, (*tensors(adapter_arguments(5, 40, 8)), True, 1e-5, ACTIVATIONS["gelu"], 0.7, True, name))
        if label == "triton":
            return
        bare = adapter_arguments(5, 40, 8, norm=False, bias=False, residuals=0)
        opcheck(op, (*tensors(bare), False, 1e-5, ACTIVATIONS["relu"], 1.0, True, name))
        frozen = {k: None if t is None else t.detach().bfloat16() for k, t in adapter_arguments(5, 40, 8).items()}
        opcheck(op, (*tensors(frozen), False, 1e-5, ACTIVATIONS["silu"], 1.0, False, name))
        a = {k: None if t is None else t.detach() for k, t in adapter_arguments(5, 40, 8).items()}
        _, z, stats = op(*tensors(a), True, 1e-5, 1, 0.7, True, name)
        saved = (a["x"], z, stats, a["w_down"], a["w_up"], a["norm_weight"], a["norm_bias"])
        for needs in (127, 0b0010101):
            opcheck(
                torch.ops.fastpetl.adapter_backward.default, (torch.randn(5, 40), *saved, True, 1, 0.7, needs, name)
            )


@pytest.mark.parametrize("label", one_cpp(ADAPTER_BACKENDS))
def test_no_two_results_are_one_tensor(label):
    """As torch asks of an op; a launcher's results without elements may be one."""
    a = {k: None if t is None else t.detach() for k, t in adapter_arguments(5, 40, 8).items()}
    parameters, tail = tensors(a)[1:], (torch.ones(40), torch.zeros(40))
    x, g, config = a["x"], torch.randn(5, 40), (True, 1e-5, 1, 0.7)
    with using("adapter", label) as name:
        forward = torch.ops.fastpetl.adapter(x, *parameters, *config, False, name)
        _, z, stats = torch.ops.fastpetl.adapter(x, *parameters, *config, True, name)
        saved = x, z, stats, a["w_down"], a["w_up"], a["norm_weight"], a["norm_bias"]
        backward = torch.ops.fastpetl.adapter_backward(g, *saved, True, 1, 0.7, 1, name)
        s, _, z, stats, tail_stats = torch.ops.fastpetl.site(x, *parameters, *tail, *config, 1, 1e-5, True, True, name)
        saved = s, tail_stats, tail[0], x, z, stats, a["w_down"], a["w_up"], a["norm_weight"], a["norm_bias"]
        site = torch.ops.fastpetl.site_backward(g, g, *saved, True, 1, 0.7, 1, 1, name)
    for results in (forward, backward, site):
        assert len({id(t) for t in results}) == len(results)


@pytest.mark.parametrize("label", one_cpp(LINEAR_BACKENDS))
def test_opcheck_linear(label):
    x, weights, biases = (
        torch.randn(5, 40, requires_grad=True),
        [torch.randn(8, 40), torch.randn(12, 40)],
        [torch.randn(8), torch.randn(12)],
    )
    norm = (torch.rand(40), torch.rand(40))
    with using("linear", label) as name:
        for prologue, b in ((0, biases), (1, []), (2, biases)):
            n = norm if prologue == 1 else (None, None)
            opcheck(torch.ops.fastpetl.linear.default, (x, weights, b, prologue, *n, 1e-6, name))


@pytest.mark.parametrize("label", ["reference", "cpp"])
def test_opcheck_attention(label):
    qkv = torch.randn(2, 7, 96, requires_grad=True)
    with using("attention", label) as name:
        opcheck(torch.ops.fastpetl.attention.default, (qkv, torch.randn(2, 7), 4, 0.3, True, name))
        opcheck(torch.ops.fastpetl.attention.default, (qkv.detach(), None, 4, 0.3, False, name))


def test_gradient_without_saved_tensors_is_refused():
    a = adapter_arguments(5, 40, 8)
    y = torch.ops.fastpetl.adapter(*tensors(a), True, 1e-5, 1, 1.0, False, "reference")[0]
    with pytest.raises(RuntimeError, match="adapter: save is False but a gradient is wanted"):
        y.sum().backward()


class Block(torch.nn.Module):
    """Frozen linears, attention and a trained adapter, as in a patched layer."""

    def __init__(self, names, d=40, r=8):
        super().__init__()
        self.names = names
        self.a = torch.nn.ParameterDict(
            {k: t for k, t in adapter_arguments(1, d, r).items() if k not in ("x", "res1", "res2")}
        )
        self.w = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.randn(d, d) / 6, requires_grad=False) for _ in range(3)]
        )
        self.norm = torch.nn.Parameter(torch.ones(d), requires_grad=False)

    def forward(self, x, mask):
        qkv = ops.linear(x, list(self.w), norm=(self.norm, None, 1e-6), backend=self.names[1])
        f = ops.attention(qkv, 4, key_mask=mask, backend=self.names[2])
        return call_adapter(ops.adapter, {**self.a, "x": x, "res1": f, "res2": None}, scale=0.7, backend=self.names[0])


@pytest.mark.parametrize("names", [("auto", "auto", "auto"), ("reference", "onednn", "reference")], ids=lambda n: n[0])
def test_compiled_block_trains_without_recompiling(names):
    model = Block(names)
    counters.clear()
    torch._dynamo.reset()
    # Inductor calls our ops as they are; plain torch needs only the trace, and its C++ would take a minute to compile
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if names[0] == "auto" else "aot_eager")

    def step(model, x, mask):
        x = x.clone().requires_grad_()
        y = model(x, mask)
        return y, *torch.autograd.grad(y.square().sum(), (x, *model.a.values()))

    graphs = []
    for shape in ((2, 7), (3, 9), (5, 6), (4, 11)):
        x, mask = torch.randn(*shape, 40), torch.randn(shape)
        for got, want in zip(step(compiled, x, mask), step(model, x, mask), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 3 and graphs[1] <= 2  # static, then dynamic, then never again
    assert not counters["graph_break"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, mask), model(x, mask))


def test_compiled_autocast():
    model = Block(("auto", "auto", "auto"))
    x, mask = torch.randn(2, 7, 40), torch.zeros(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = torch.compile(model, fullgraph=True, backend="aot_eager")(x, mask), model(x, mask)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_fake_tensors_go_through_the_registered_op():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        a = {k: mode.from_tensor(t) for k, t in adapter_arguments(6, 40, 8).items()}
        y = call_adapter(ops.adapter, {**a, "x": a["x"].view(2, 3, 40), "res1": None, "res2": None}, backend="auto")
        assert y.shape == (2, 3, 40)
        assert ops.linear(a["x"], a["w_down"].detach()).shape == (6, 8)
        assert ops.attention(torch.empty(2, 7, 96), 4).shape == (2, 7, 32)


def test_export_keeps_the_ops_and_dynamic_sizes():
    model = Block(("auto", "auto", "auto"))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(model, (torch.randn(2, 7, 40), torch.zeros(2, 7)), dynamic_shapes=(sizes, sizes))
    if extension()[0] is not None:
        targets = {str(node.target) for node in program.graph.nodes}
        assert {f"fastpetl.{op}.default" for op in ("adapter", "linear", "attention")} <= targets
    x, mask = torch.randn(3, 9, 40), torch.zeros(3, 9)
    torch.testing.assert_close(program.module()(x, mask), model(x, mask))
