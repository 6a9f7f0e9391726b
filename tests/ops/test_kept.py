"""What ops keep for the backward, and that the gradients are those of the full tensors: GELU's code, ReLU's bits,
attention without its output, sites from their norm or their inputs.
"""

import pytest
import torch
import torch.nn.functional as F

from fastpetl import backends, ops
from fastpetl._build import extension
from fastpetl.ops import _attention, _fused
from fastpetl.spec import AdapterSpec
from ops.op_cases import assert_two_times, needs_cpp

raw = torch.ops.fastpetl
GELU, RELU = 2, 1
pytestmark = needs_cpp


def kept(function, *known):
    """(function's result, bytes of the distinct storages kept for its backward, less those of `known`)."""
    ours, found = {t.untyped_storage().data_ptr() for t in known if t is not None}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return out, sum(found.values())


def line():
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e30])])
    return F.pad(x, (0, -len(x) % 96)).view(-1, 96)


# --- GELU -------------------------------------------------------------------------------------------------------------


def test_code_of_gelu_over_the_whole_line(isa):
    """Within half a step of 1 / 819200 and fp32's own error, exact at 0 and 1; the layout is every set's."""
    x = line()
    y, code = raw.cpu_activation_forward(x, GELU, False)
    assert code.dtype == torch.uint8 and code.shape == (len(x), 240)
    dx = raw.cpu_activation_backward(torch.ones_like(x), code, GELU, 1.0)
    exact = x.double().requires_grad_()
    F.gelu(exact).sum().backward()
    assert ((dx.double() - exact.grad).abs() / x.double().abs().clamp(min=1)).max() < 1.2e-6
    assert (dx[x > 8] == 1).all() and (dx[x < -8] == 0).all()
    torch.testing.assert_close(y, F.gelu(x), rtol=1e-6, atol=2e-6)
    module, _ = extension()
    for other in module.cpu_isas():
        module.set_cpu_isa(other)
        assert torch.equal(raw.cpu_activation_backward(torch.ones_like(x), code, GELU, 1.0), dx)


def test_code_keeps_what_is_not_a_number(isa):
    x = torch.zeros(2, 32)
    x[0, 5], x[1, 20] = torch.nan, torch.inf
    _, code = raw.cpu_activation_forward(x, GELU, False)
    dx = raw.cpu_activation_backward(torch.ones_like(x), code, GELU, 1.0)
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[0, 5] = bad[1, 20] = True  # inf * 0, as in torch
    assert torch.equal(dx.isnan(), bad) and (dx[~bad] == 0.5).all()


def test_coded_linear_is_the_activation_and_the_linear(isa):
    """Any split into blocks of rows, columns and depth."""
    for rows, k, n in ((1, 32, 5), (199, 1120, 40), (70, 3072, 33)):
        x, w, b = torch.randn(rows, k) * 2, torch.randn(n, k) * k**-0.5, torch.randn(n)
        y, code = raw.cpu_linear_forward_coded(x, [w], [b])
        h, want = raw.cpu_activation_forward(x, GELU, False)
        assert torch.equal(code, want)
        torch.testing.assert_close(y, F.linear(h, w, b), rtol=1e-5, atol=1e-5)
        g = torch.randn(rows, n)
        dx = raw.cpu_linear_backward_coded(g, code, [w])
        torch.testing.assert_close(dx, raw.cpu_activation_backward(g @ w, code, GELU, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpp", "onednn", "torch"])
def test_gelu_keeps_five_eighths_of_its_input(name, monkeypatch):
    """Whichever GEMM "auto" takes; a backend asked for by name that is not ours keeps x, and so does an odd width."""
    monkeypatch.setattr(backends, "pick", lambda key, runs, *_: name)
    monkeypatch.setattr(backends, "picked", lambda key: name)
    x, w = torch.randn(64, 256, requires_grad=True), torch.randn(512, 256) / 16
    y, size = kept(lambda: ops.linear(x, w, activation="gelu"), w)
    assert size == x.numel() * 5 // 2
    cotangent = torch.randn_like(y)
    wide = x.detach().double().requires_grad_()
    want = torch.autograd.grad(F.linear(F.gelu(wide), w.double()), wide, cotangent.double())[0]
    theirs = torch.autograd.grad(F.linear(F.gelu(x), w), x, cotangent)[0]
    assert_two_times(torch.autograd.grad(y, x, cotangent)[0], theirs, want, "dx")
    if name != "cpp":
        assert kept(lambda: ops.linear(x, w, activation="gelu", backend=name), w)[1] == 4 * x.numel()
    odd = torch.randn(64, 248, requires_grad=True)
    assert kept(lambda: ops.linear(odd, w[:, :248].contiguous(), activation="gelu"), w)[1] >= 4 * odd.numel()


# --- ReLU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("op", ["dropout", "relu_dropout"])
def test_dropout_is_torchs(isa, op, p, dtype):
    """The same draws, the same bits forward and backward, NaN and zero included; a bit an element is kept."""
    for shape in ((5,), (3000,), (7, 96), (2, 9, 31)):
        x = torch.randn(shape).to(dtype)
        x.view(-1)[:3] = torch.tensor([0.0, torch.nan, -0.0])
        cotangent, results = torch.randn(shape).to(dtype), []
        for function in (getattr(ops, op), getattr(ops, f"{op}_reference")):
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_()
            y, size = kept(lambda leaf=leaf, function=function: function(leaf, p))
            results.append((y.detach().clone(), torch.autograd.grad(y, leaf, cotangent)[0], torch.rand(1)))
            if function is ops.relu_dropout or (function is ops.dropout and 0 < p < 1):
                assert size == -(-x.numel() // 8)
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_relu_dropout_is_the_callers_and_first_order():
    x = torch.randn(4, 33, requires_grad=True)
    y = ops.relu_dropout(x, 0.2)
    y += 1
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="relu_dropout: .* cannot be differentiated twice"):
        g.sum().backward()
    with pytest.raises(ValueError, match="relu_dropout: p is 1.5, expected a probability"):
        ops.relu_dropout(x, 1.5)
    for op in (ops.relu_dropout, ops.dropout):  # where nothing is recorded too
        with pytest.raises(ValueError, match="dropout: backend is 'fast', expected auto, cpp"):
            op(x.detach(), 0.5, backend="fast")
        with pytest.raises(RuntimeError, match="dropout: backend is 'triton', which cannot serve"):
            op(x.detach(), 0.5, backend="triton")
    assert torch.equal(ops.relu_dropout(x.detach()), F.relu(x))


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(1, 2, 64), (56, 3, 64), (200, 2, 64), (97, 2, 40), (290, 1, 128)]
)
def test_attention_without_its_output(isa, tokens, heads, dim, dtype):
    if isa == "portable" and tokens > 100:
        pytest.skip("slow there, and nothing that smaller ones have not")
    qkv, mask = torch.randn(2, tokens, 3 * heads * dim).to(dtype), torch.zeros(2, tokens)
    mask[1, tokens // 2 + 1 :] = torch.finfo(torch.float32).min
    out, lse = raw.cpu_attention_forward(qkv, mask, heads, dim**-0.5, True)
    g = torch.randn(out.shape).to(dtype)
    want = raw.cpu_attention_backward(g, qkv, mask, out, lse, heads, dim**-0.5)
    got = raw.cpu_attention_backward(g, qkv, mask, None, lse, heads, dim**-0.5)
    wide = qkv.double().requires_grad_()
    truth = torch.autograd.grad(ops.attention_reference(wide, heads, key_mask=mask.double()), wide, g.double())[0]
    assert_two_times(got, want, truth, "dqkv")


def test_attention_keeps_its_output_of_many_tokens_only(monkeypatch):
    monkeypatch.setattr(_attention, "WITHOUT_OUT", 20)
    for tokens in (20, 21):
        qkv = torch.randn(2, tokens, 3 * 64, requires_grad=True)
        out, size = kept(lambda qkv=qkv: ops.attention(qkv, 1, backend="cpp"), qkv)
        assert size == 4 * 2 * tokens * (1 + 64 * (tokens > 20))
        want = torch.autograd.grad(ops.attention_reference(qkv, 1).square().sum(), qkv)[0]
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), qkv)[0], want, rtol=1e-4, atol=1e-5)


# --- sites ------------------------------------------------------------------------------------------------------------

PARTS = ("x", "f", "w_down", "b_down", "w_up", "b_up", "tail_weight", "tail_bias", "norm_weight", "norm_bias")


def site(input, bias=True, d=768, r=96, rows=70):
    """(spec, tensors by name), the gains around 1."""
    spec = AdapterSpec(d, r, "gelu_tanh", norm=input == "residual", norm_bias=input == "residual", up_bias=True,
                       down_bias=True, input=input, tail="layernorm", emit="norm")  # fmt: skip
    drawn = [torch.randn(rows, d), torch.randn(rows, d), torch.randn(r, d) * d**-0.5, torch.randn(r)]
    drawn += [torch.randn(d, r) * r**-0.5, torch.randn(d), 1 + 0.2 * torch.randn(d), torch.randn(d) if bias else None]
    drawn += [1 + 0.2 * torch.randn(d), torch.randn(d)] if input == "residual" else [None, None]
    return spec, dict(zip(PARTS, drawn, strict=True))


def gradients(spec, tensors, keep):
    leaves = {k: t if t is None else t.clone().requires_grad_() for k, t in tensors.items()}
    wanted = [t for t in leaves.values() if t is not None]
    x, f, *mine = (leaves[k] for k in PARTS[:6])
    rest = {k: leaves[k] for k in PARTS[6:]}
    n, size = kept(lambda: ops.adapter_residual_norm(x, f, *mine, spec=spec, **rest, backend="cpp", keep=keep), *wanted)
    cotangent = torch.linspace(-1, 1, n.numel()).view(n.shape).sin()
    return size, n.detach(), *torch.autograd.grad(n, wanted, cotangent)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input", ["residual", "sublayer"])
def test_sites_from_their_norm_or_inputs(isa, input, bias):
    """n is the site's own output, which is counted here: as much as s; the inputs are known to be kept."""
    if isa == "portable":
        sizes = {"d": 104, "r": 8, "rows": 20}
    else:
        sizes = {}
    spec, tensors = site(input, bias, **sizes)
    want_size, *want = gradients(spec, tensors, "sum")
    d, r, rows = spec.hidden, spec.bottleneck, len(tensors["x"])
    for keep in ("norm", "inputs"):
        size, *got = gradients(spec, tensors, keep)
        own = 2 * rows if spec.norm else 0
        assert size == (want_size if keep == "norm" else want_size - 4 * (rows * (d + r) + own))
        for name, a, b in zip(("n", *PARTS), got, want, strict=False):
            assert (a - b).norm() <= 2e-6 * b.norm(), (keep, name)


def test_norm_with_a_gain_near_zero_keeps_the_sum(monkeypatch):
    spec, tensors = site("sublayer")
    asked = []
    real = _fused._kept
    monkeypatch.setattr(_fused, "_kept", lambda *a: asked.append(real(*a)) or asked[-1])
    _, *want = gradients(spec, tensors, "norm")
    for weight, bias in ((0.0, 0.0), (1e-3, 1.0)):
        tensors["tail_weight"][3], tensors["tail_bias"][3] = weight, bias
        _, *want = gradients(spec, tensors, "sum")
        _, *got = gradients(spec, tensors, "norm")
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert asked == ["norm", "sum", "sum", "sum", "sum"]


def test_keep_is_checked():
    spec, t = site("sublayer", rows=3)
    with pytest.raises(ValueError, match="adapter_residual_norm: keep is 'n', expected one of sum, norm, inputs"):
        ops.adapter_residual_norm(*(t[k] for k in PARTS[:6]), spec=spec, tail_weight=t["tail_weight"], keep="n")
