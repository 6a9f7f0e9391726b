"""What Python adds to the CUDA kernels, checked without a GPU: their share of the backward is written in torch here."""

import pytest
import torch

from fastpetl import ops
from fastpetl.ops import _adapter, _cuda
from fastpetl.ops import _residual_norm as rn
from ops import test_site_launchers as launchers
from ops.op_cases import NAMES, adapter_arguments, assert_two_times, call_adapter, gradients, like


def over_rows(g_s, g_n, s, tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, add_x, code, scale, tail,
              want_dx, want_h, want_tail):  # fmt: skip
    """(g, dx, dz, h, tail_partial) as csrc/cuda/site_backward.cu gives them: two blocks' shares of the tail."""
    g, partial = g_s, x.new_empty(0, dtype=torch.float32)
    if g_n is not None:
        ds, _, _ = rn.norm_backward(g_n, s, tail_stats, tail_weight, tail)
        g = (ds if g_s is None else g_s.float() + ds).to(x.dtype)
        shares = [
            rn.norm_backward(g_n[i], s[i], tail_stats[i], tail_weight, tail)[1:] for i in (slice(9), slice(9, None))
        ]
        partial = torch.stack([torch.stack(share) for share in shares]) if want_tail else partial
    dz = (scale * (g.float() @ w_up.float())).float() * _derivative(code, z.float())
    h = _adapter.ACT[code](z.float()).to(x.dtype)
    mine = (w_down, w_up, norm_weight, None)
    dx = _adapter.reference_backward(g, x, z, stats, *mine, add_x, code, scale, 1)[0] if want_dx else x.new_empty(0)
    return (g if g_n is not None else x.new_empty(0)), dx, dz.to(x.dtype), h if want_h else x.new_empty(0), partial


def _derivative(code, z):
    z = z.requires_grad_()
    with torch.enable_grad():
        (d,) = torch.autograd.grad(_adapter.ACT[code](z).sum(), z)
    return d


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(_cuda, "_over_rows", over_rows)
    monkeypatch.setattr(_cuda, "site_forward", launchers._site.reference_forward)
    launchers._site._launchers.cache_clear()
    yield
    launchers._site._launchers.cache_clear()


class Named:
    def __enter__(self):
        return "cuda"

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("site", launchers.SITES)
@pytest.mark.parametrize("rows", [19, 300])
def test_site_gradients(monkeypatch, site, dtype, rows):
    monkeypatch.setattr(launchers, "launcher", lambda *a: Named())
    launchers.check("cuda", site, rows, 40, 24, dtype, with_sum=launchers.SITES[site][-1])


def test_site_gradients_only_where_asked_for(monkeypatch):
    monkeypatch.setattr(launchers, "launcher", lambda *a: Named())
    launchers.test_only_what_is_asked_for("cuda")
    launchers.test_a_norm_that_is_not_used("cuda")
    launchers.test_no_rows("cuda")


def test_results_share_no_memory(monkeypatch):
    """A registered op's results must not; in fp32 a conversion copies nothing."""
    monkeypatch.setattr(launchers, "launcher", lambda *a: Named())
    a = launchers.arguments(9, 40, 8, "vilt")
    g_s, g_n = torch.randn(2, 9, 40).unbind()
    with launchers.launcher("cuda") as name:
        out = launchers.launch_back(name, a, "vilt", launchers.launch(name, a, "vilt"), g_s, g_n, 511)
    assert len({t.untyped_storage().data_ptr() for t in out}) == len(out) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("arguments", [{}, dict(norm=False, bias=False, residuals=0), dict(norm_bias=False)], ids=str)
def test_adapter_gradients(dtype, arguments):
    a = adapter_arguments(70, 40, 24, dtype, **arguments)
    g = torch.randn(70, 40).to(dtype)
    t = {k: None if v is None else v.detach() for k, v in a.items()}
    _, z, stats = _adapter.reference_forward(*t.values(), True, 1e-5, 2, 0.7, True)
    saved = (t["x"], z, stats, t["w_down"], t["w_up"], t["norm_weight"], t["norm_bias"])
    needs = sum(1 << i for i, k in enumerate(NAMES[:7]) if a[k] is not None)
    got = _adapter.run_backward("cuda", g, *saved, True, 2, 0.7, needs)
    assert len(got) == 7

    def torchs(dtype):
        leaves = like(a, dtype)
        return gradients(call_adapter(ops.adapter_reference, leaves, activation="gelu", scale=0.7), leaves, g)

    theirs, want = torchs(dtype), torchs(torch.float64)
    for k, t in zip(NAMES[:7], got, strict=True):
        if a[k] is not None:
            assert_two_times(t, theirs[k], want[k], f"gradient of {k}")
        else:
            assert t.numel() == 0
