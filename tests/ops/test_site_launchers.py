"""The site in one launch: each launcher against torch's own formula in float64, what it saves, what it leaves out."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from fastpetl import _tuned, backends
from fastpetl.ops import _site
from ops.op_cases import DEVICE, SITE_LAUNCHERS, adapter_arguments, assert_two_times, gradients, like, using
from ops.op_cases import NAMES as ADAPTER_NAMES

ACT = [lambda z: z, F.relu, F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu]
RELU, GELU, TANH = 1, 2, 3
# name -> (what is there, add_x, activation, scale, tail, emit_s): what the launcher sees of the papers' sites
SITES = {
    "vilt": (dict(residuals=1), True, RELU, 1.0, 1, True),
    "meter": (dict(residuals=1), True, RELU, 1.0, 1, False),
    "vlbart": (dict(residuals=1, norm=False), True, TANH, 1.0, 1, False),
    "vlt5": (dict(residuals=1, norm=False), True, TANH, 1.0, 2, True),
    "adaptformer": (dict(residuals=2, norm_bias=False, bias=False), False, GELU, 0.1, 1, True),
}
EPS, TAIL_EPS = 1e-5, 1e-6
NAMES = (*ADAPTER_NAMES, "tail_weight", "tail_bias")
PARAMETERS = (*NAMES[:7], *NAMES[9:])  # in the order of the bits of `needs`


@contextlib.contextmanager
def launcher(label, dtype=torch.float32):
    if label in ("reference", "composed"):
        yield label
    else:
        with using("site", label, dtype) as name:
            yield name


def arguments(rows, d, r, site, dtype=torch.float32):
    there, _, _, _, tail, _ = SITES[site]
    a = adapter_arguments(rows, d, r, dtype, **there)
    a["tail_weight"] = (1 + 0.2 * torch.randn(d)).to(dtype).requires_grad_()
    a["tail_bias"] = (0.2 * torch.randn(d)).to(dtype).requires_grad_() if tail == 1 and site != "meter" else None
    return a


def formula(a, site):
    """(s, n), each step rounded to the tensors' dtype, the tail's statistics in fp32 or wider."""
    _, add_x, act, scale, tail, _ = SITES[site]
    x, d = a["x"], a["x"].shape[-1:]
    h = x if a["norm_weight"] is None else F.layer_norm(x, d, a["norm_weight"], a["norm_bias"], EPS)
    s = scale * F.linear(ACT[act](F.linear(h, a["w_down"], a["b_down"])), a["w_up"], a["b_up"])
    for r in (x if add_x else None, a["res1"], a["res2"]):
        s = s if r is None else s + r
    if tail == 1:
        return s, F.layer_norm(s, d, a["tail_weight"], a["tail_bias"], TAIL_EPS)
    return s, F.rms_norm(s, d, a["tail_weight"], TAIL_EPS)


def launch(name, a, site, emit_s=True, save=True):
    _, add_x, act, scale, tail, _ = SITES[site]
    tensors = [None if a[k] is None else a[k].detach() for k in NAMES]
    return _site.run_forward(name, *tensors, add_x, EPS, act, scale, tail, TAIL_EPS, emit_s, save)


def launch_back(name, a, site, saved, g_s, g_n, needs):
    _, add_x, act, scale, tail, _ = SITES[site]
    s, _, z, stats, tail_stats = saved
    t = {k: None if v is None else v.detach() for k, v in a.items()}
    mine = (t["x"], z, stats, t["w_down"], t["w_up"], t["norm_weight"], t["norm_bias"])
    return _site.run_backward(
        name, g_s, g_n, s, tail_stats, t["tail_weight"], *mine, add_x, act, scale, tail, needs
    )  # fmt: skip


def nearly(p, q) -> bool:
    """Equal but for the order of fp32 sums, measured by the largest element: a sum may cancel to a small one."""
    return bool((p - q).abs().max() <= 3e-6 * q.abs().max())


def every(a) -> int:
    return sum(1 << i for i, k in enumerate(PARAMETERS) if a[k] is not None)


def check(label, site, rows, d, r, dtype, with_sum):
    a = arguments(rows, d, r, site, dtype)
    g_s, g_n = (torch.randn(rows, d).to(a["x"]) for _ in range(2))
    g_s = g_s if with_sum else None
    with launcher(label, dtype) as name:
        out = launch(name, a, site)
        found = launch_back(name, a, site, out, g_s, g_n, every(a))

    def torchs(dtype):
        leaves = like(a, dtype)
        s, n = formula(leaves, site)
        total = (n * g_n.to(dtype)).sum() + (0 if g_s is None else (s * g_s.to(dtype)).sum())
        return s.detach(), n.detach(), gradients(total, leaves, torch.ones(()))

    (s, n, theirs), (s64, n64, want) = torchs(dtype), torchs(torch.float64)
    assert_two_times(out[0], s, s64, "s")
    assert_two_times(out[1], n, n64, "n")
    assert_two_times(found[0], theirs["res1"], want["res1"], "g")
    for k, got in zip(PARAMETERS, found[1:], strict=True):
        if a[k] is not None:
            assert_two_times(got.view_as(theirs[k]), theirs[k], want[k], f"gradient of {k}")
        else:
            assert got.numel() == 0, k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("label", SITE_LAUNCHERS)
def test_launchers_match_float64(label, site, dtype):
    check(label, site, 19, 40, 24, dtype, with_sum=SITES[site][-1])


@pytest.mark.parametrize("label", [name for name in SITE_LAUNCHERS if name != "triton"])  # its interpreter is slow
@pytest.mark.parametrize("rows, d, r", [(1, 760, 100), (67, 768, 96), (130, 70, 13), (33, 768, 288)])
def test_odd_sizes(label, rows, d, r):
    check(label, "vilt", rows if label != "cpp-portable" else min(rows, 9), d, r, torch.float32, with_sum=True)


@pytest.mark.parametrize("site", SITES)
def test_reference_launcher_in_float64(site):
    """Against autograd to the last digits: it serves the registered op, and it is what launchers are written from."""
    a = arguments(6, 10, 4, site, torch.float64)
    g_s, g_n = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    out = launch("reference", a, site)
    s, n = formula(a, site)
    torch.testing.assert_close((out[0], out[1]), (s.detach(), n.detach()))
    for g_sum, g_norm in ((g_s, g_n), (None, g_n), (g_s, None)):
        got = launch_back("reference", a, site, out, g_sum, g_norm, every(a))
        outs = [(o, g) for o, g in zip(formula(a, site), (g_sum, g_norm), strict=True) if g is not None]
        wanted = {k: t for k, t in a.items() if t is not None}
        ys, gs = zip(*outs, strict=True)
        found = torch.autograd.grad(ys, list(wanted.values()), gs, allow_unused=True)
        want = {k: torch.zeros_like(wanted[k]) if g is None else g for k, g in zip(wanted, found, strict=True)}
        torch.testing.assert_close(got[0], want["res1"])
        for k, g in zip(PARAMETERS, got[1:], strict=True):
            torch.testing.assert_close(g, want.get(k, g.new_empty(0)))


@pytest.mark.parametrize("label", SITE_LAUNCHERS)
def test_only_what_is_asked_for(label):
    """Each subset of gradients is the full set's; the sum, and what a backward needs, only where wanted."""
    a = arguments(9, 40, 8, "vilt")
    g_s, g_n = (torch.randn(9, 40).to(a["x"]) for _ in range(2))
    with launcher(label) as name:
        both = launch(name, a, "vilt")
        assert [t.shape[0] for t in both] == [9] * 5 and both[3].dtype == both[4].dtype == torch.float32
        for emit_s, save in ((True, False), (False, False), (False, True)):
            out = launch(name, a, "vilt", emit_s, save)
            assert torch.equal(out[1], both[1])
            assert [t.numel() > 0 for t in out] == [emit_s or save, True, save, save, save]
        full = launch_back(name, a, "vilt", both, g_s, g_n, 511)
        for needs in [*(1 << i for i in range(9)), 0, 0b110000000, 0b010101010]:
            some = launch_back(name, a, "vilt", both, g_s, g_n, needs)
            # Where no product of the adapter's is needed (db_up is a sum of g), another kernel may compute g: equal but
            # for the order of a row's sums. On a GPU each subset is a kernel of its own, contracted in its own way.
            same = torch.equal if needs & 0b1101111 and DEVICE == "cpu" else nearly
            assert same(some[0], full[0])
            for i, (part, whole) in enumerate(zip(some[1:], full[1:], strict=True)):
                assert same(part, whole) if needs >> i & 1 else part.numel() == 0, (needs, PARAMETERS[i])
        again = launch_back(name, a, "vilt", both, g_s, g_n, 511)
    assert all(torch.equal(p, q) for p, q in zip(again, full, strict=True))


@pytest.mark.parametrize("label", SITE_LAUNCHERS)
def test_a_norm_that_is_not_used(label):
    """Without a gradient of n the adapter's backward serves, by the same backend; the tail's parameters get zeros."""
    a = arguments(9, 40, 8, "vilt")
    g = torch.randn(9, 40).to(a["x"])
    with launcher(label) as name:
        got = launch_back(name, a, "vilt", launch(name, a, "vilt"), g, None, 511)
    want = gradients(formula(a, "vilt")[0], {k: t for k, t in a.items() if "tail" not in k}, g)
    assert torch.equal(got[0], g) and not got[8].any() and not got[9].any() and got[8].shape == got[9].shape == (40,)
    for k, t in zip(PARAMETERS[:7], got[1:8], strict=True):
        torch.testing.assert_close(t, want[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", SITE_LAUNCHERS)
def test_no_rows(label):
    a = arguments(0, 40, 8, "vilt")
    with launcher(label) as name:
        out = launch(name, a, "vilt")
        got = launch_back(name, a, "vilt", out, a["x"].detach(), a["x"].detach(), 511)
    assert [tuple(t.shape) for t in out] == [(0, 40), (0, 40), (0, 8), (0, 2), (0, 2)]
    assert got[0].shape == (0, 40) and got[1].shape == (0, 40)
    for k, t in zip(PARAMETERS[1:], got[2:], strict=True):
        assert t.shape == a[k].shape and not t.any(), k


# --- which of them serves ---------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    """Sets the table of measurements and the architecture that the tensors are taken to be on."""
    monkeypatch.delenv("FASTPETL_BACKEND", raising=False)

    def put(found):
        monkeypatch.setattr(_tuned, "table", lambda: {"sm_90": found})
        monkeypatch.setattr(_tuned, "_architecture", lambda index: "sm_90")
        _tuned._lookup.cache_clear()
        backends._RESOLVED.clear()

    yield put
    _tuned._lookup.cache_clear()
    backends._RESOLVED.clear()


def test_a_table_of_measurements_chooses_by_size(table, monkeypatch):
    table({"site": {"float32": {"64": {"256": "composed", "4096": "cuda"}, "256": {"256": "triton"}}}})
    monkeypatch.setattr(backends, "_serves", lambda op, name, *a: name != "triton")
    monkeypatch.setattr(backends, "candidates", lambda *a: ("composed",))
    choice = backends.resolve_for("site", "auto", "cuda", torch.float32)
    assert choice.name == backends.BY_SIZE and "measured" in choice.reason
    assert backends.serving("site", "auto", "cuda", torch.float32) == (backends.BY_SIZE,)

    def found(rows, width, dtype=torch.float32):
        return backends.of_size("site", backends.BY_SIZE, torch.empty(rows, 8, dtype=dtype), width)

    assert [found(n, 48) for n in (1, 256, 257, 4096, 99999)] == ["composed", "composed", "cuda", "cuda", "cuda"]
    assert found(1, 200) == "composed"  # it says triton, which does not serve here: what "auto" says without a table
    assert found(300, 300) == "composed" and found(300, 48, torch.float16) == "composed"  # nothing measured
    assert backends.of_size("site", "cuda", torch.empty(1, 8), 48) == "cuda"  # asked for by name


def test_where_a_table_has_no_say(table, monkeypatch):
    table({"site": {"float32": {"64": {"256": "cuda"}}}})
    for op, device, dtype in (("adapter", "cuda", torch.float32), ("site", "cpu", torch.float32),
                              ("site", "cuda", torch.float64)):  # fmt: skip
        assert backends.resolve_for(op, "auto", device, dtype).name != backends.BY_SIZE
    monkeypatch.setenv("FASTPETL_BACKEND", "composed")
    assert backends.resolve_for("site", "auto", "cuda", torch.float32).name == "composed"


def test_what_is_chosen_by_size_runs(table, monkeypatch):
    """The launchers look the size up themselves, forward and backward: compiled code does not know it."""
    composed = {"float32": {"64": {"256": "composed"}}}
    table({"site": composed})
    a = arguments(9, 40, 8, "vilt")
    used, launchers = [], _site._launchers
    monkeypatch.setattr(_site, "_launchers", lambda name: used.append(name) or launchers(name))
    out = launch(backends.BY_SIZE, a, "vilt")
    launch_back(backends.BY_SIZE, a, "vilt", out, None, torch.randn(9, 40), 511)
    usual = backends.candidates("site", out[1].device.type, torch.float32)[0]
    assert used == ["composed", usual]  # the backward has a table of its own
    table({"site_backward": composed})
    launch_back(backends.BY_SIZE, a, "vilt", out, None, torch.randn(9, 40), 511)
    assert used[2:] == ["composed"]


def test_the_shipped_table_names_backends_that_exist():
    for ops in _tuned.table().values():
        for op, dtypes in ops.items():
            for widths in dtypes.values():
                for width, by_rows in widths.items():
                    assert _tuned.size_class(int(width)) == int(width) and by_rows
                    assert set(by_rows.values()) <= set(backends.BACKENDS[op.removesuffix("_backward")])


def test_a_backend_without_the_kernel_is_no_error():
    """The parts answer for it: with their own backend of that name, or by raising with the reason."""
    assert backends.if_served("site", "reference", "cpu", torch.float32) is None
    assert backends.if_served("site", "cpp", "cpu", torch.float64) is None
    assert backends.if_served("site", "auto", "cpu", torch.float64) == "composed"
    with pytest.raises(ValueError, match="site: backend is 'fast', expected auto, cpp, triton, cuda, composed"):
        backends.if_served("site", "fast", "cpu", torch.float32)
