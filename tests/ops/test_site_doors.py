"""adapter_residual_norm in one launch, eager and compiled: which calls it takes, its gradients, its registered op."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.library import opcheck

from fastpetl import backends, ops
from fastpetl.ops import _fused
from ops.op_cases import DEVICE, SITE_LAUNCHERS
from ops.test_site import AFTER_OWN, METER_FFN, SITES, VILT, doubled, results, site
from ops.test_site_launchers import NAMES, arguments, launcher

INSIDE = {name: spec for name, spec in SITES.items() if spec.placement == "inside"}
LABELS = list(dict.fromkeys(label.partition("-")[0] for label in SITE_LAUNCHERS))  # the doors are the same for all isas


@pytest.fixture
def served(monkeypatch):
    """Makes a launcher serve every site that can be one launch; returns the list of its forwards."""
    calls = []
    monkeypatch.setenv("FASTPETL_TUNE", "0")  # else the measurement's calls would count

    def by(name):
        def constant(*_):
            return name

        constant._dynamo_marked_constant = True
        monkeypatch.setattr(backends, "if_served", constant)
        monkeypatch.setattr(backends, "if_served_constant", constant)
        forward = _fused.eager_forward
        monkeypatch.setattr(_fused, "eager_forward", lambda *a: calls.append(a[0]) or forward(*a))
        return calls

    return by


def agree(made, spec, **options):
    """Outputs and every gradient against the reference in float64."""
    want = results(ops.adapter_residual_norm_reference, *doubled(*made), spec=spec, **options)
    ours = results(ops.adapter_residual_norm, *made, spec=spec, **options)
    for i, (o, w) in enumerate(zip(ours, want, strict=True)):
        torch.testing.assert_close(o.double(), w, rtol=1e-4, atol=5e-5, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("label", LABELS)
def test_every_gradient_through_the_eager_door(served, label, name):
    made = site(INSIDE[name])
    with launcher(label) as backend:
        calls = served(backend)
        agree(made, INSIDE[name])
    assert len(calls) == (0 if label == "composed" else 1)


def test_forward_and_backward_ask_the_table_apart(served, monkeypatch):
    """What the forward was told is not what the backward takes."""
    asked, made = [], site(VILT)
    served(backends.BY_SIZE)

    def by_table(op, name, x, width, backward=False):
        asked.append((op, name, backward))
        return "reference" if backward else "composed"

    monkeypatch.setattr(backends, "of_size", by_table)
    agree(made, VILT)
    by_size = [a[2] for a in asked if a[:2] == ("site", backends.BY_SIZE)]
    assert by_size == [False, True]


@pytest.mark.parametrize("name", INSIDE)
def test_kept_samples_take_one_launch_too(served, name):
    calls = served("reference")
    agree(site(INSIDE[name], (4, 3), shortcut=16), INSIDE[name], mask=torch.tensor([True, False, False, True]))
    assert calls == ["reference"]


def test_without_a_sublayer_and_without_gradients(served):
    calls = served("reference")
    (x, _, *w), named, _ = site(VILT)
    with torch.no_grad():
        got = ops.adapter_residual_norm(x, None, *w, spec=VILT, **named)
        want = ops.adapter_residual_norm_reference(x, None, *w, spec=VILT, **named)
        torch.testing.assert_close(got, want)
        norm = replace(VILT, emit="norm")
        torch.testing.assert_close(ops.adapter_residual_norm(x, None, *w, spec=norm, **named), want[1])
    assert calls == ["reference"] * 2


@pytest.mark.parametrize(
    "wanted", [(0,), (1,), (2, 5), ("tail_weight",), ("tail_bias", 0), ("norm_weight", 4)], ids=str
)
def test_gradients_only_where_wanted(served, wanted):
    served("reference")
    tensors, named, _ = site(VILT)
    tensors = tuple(t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors))
    named = {k: t.detach().requires_grad_(k in wanted) for k, t in named.items()}
    leaves = [t for t in (*tensors, *named.values()) if t.requires_grad]

    def grads(function):
        s, n = function(*tensors, spec=VILT, **named)
        return torch.autograd.grad((s * n).sum(), leaves)

    for a, b in zip(grads(ops.adapter_residual_norm), grads(ops.adapter_residual_norm_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_one_output_without_a_gradient(served):
    served("reference")
    tensors, named, _ = site(VILT)
    leaves = [*tensors, *named.values()]
    for i in (0, 1):
        found = [
            torch.autograd.grad(f(*tensors, spec=VILT, **named)[i].square().sum(), leaves, allow_unused=True)
            for f in (ops.adapter_residual_norm, ops.adapter_residual_norm_reference)
        ]
        for a, b in zip(*found, strict=True):
            a, b = (torch.zeros(()) if t is None else t for t in (a, b))
            torch.testing.assert_close(a, b.expand_as(a), rtol=1e-4, atol=1e-4)


CAST = {"f": torch.bfloat16}


@pytest.mark.parametrize(
    "what, spec, change",
    [
        ("dropout", replace(VILT, dropout=0.1), {}),
        ("placement", METER_FFN, {}),
        ("placement", AFTER_OWN, {}),
        ("no tail", replace(VILT, tail=None, emit="sum"), {}),
        ("autocast", VILT, CAST),
        ("torch.func", VILT, {}),
    ],
)
def test_what_is_composed(served, what, spec, change):
    calls = served("reference") if what != "torch.func" else []
    (x, f, *w), named, _ = site(spec)
    options = {"seed": torch.tensor([3])} if spec.dropout else {}
    if what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            ops.adapter_residual_norm(x, f.bfloat16(), *w, spec=spec, **named)
            ops.adapter_residual_norm(x, f, *w, spec=spec, **named)  # all of float32: autocast casts the products
    elif what == "torch.func":
        got = torch.func.vmap(lambda x, f: ops.adapter_residual_norm(x, f, *w, spec=spec, **named)[1])(x, f)
        torch.testing.assert_close(got, ops.adapter_residual_norm_reference(x, f, *w, spec=spec, **named)[1])
    else:
        ops.adapter_residual_norm(x, f, *w, spec=spec, **named, **options)
    assert calls == []


def test_composed_by_name():
    tensors, named, _ = site(VILT)
    got = ops.adapter_residual_norm(*tensors, spec=VILT, **named, backend="composed")
    torch.testing.assert_close(got, ops.adapter_residual_norm_reference(*tensors, spec=VILT, **named))


def test_wrong_shapes_reach_no_launcher(served):
    calls = served("reference")
    (x, f, w_down, b_down, w_up, b_up), named, _ = site(VILT)
    with pytest.raises(ValueError, match="adapter: w_up has shape \\(24, 64\\)"):
        ops.adapter_residual_norm(x, f, w_down, b_down, w_up.t(), b_up, spec=VILT, **named)
    with pytest.raises(ValueError, match="adapter: w_up has dtype bfloat16"):
        ops.adapter_residual_norm(x, f, w_down, b_down, w_up.bfloat16(), b_up, spec=VILT, **named)
    with pytest.raises(ValueError, match="residual_norm: bias has shape \\(63,\\)"):
        wrong = {**named, "tail_bias": named["tail_bias"][:63]}
        ops.adapter_residual_norm(x, f, w_down, b_down, w_up, b_up, spec=VILT, **wrong)
    assert calls == []


def test_outputs_are_the_callers(served):
    """They may be modified in place; where the backward needs the sum, a write to it is noticed."""
    served("reference")
    tensors, named, _ = site(VILT)
    s, n = ops.adapter_residual_norm(*tensors, spec=VILT, **named)
    n += 1
    (s.sum() + n.sum()).backward()
    s, n = ops.adapter_residual_norm(*tensors, spec=VILT, **named)
    with torch.no_grad():
        s.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        n.sum().backward()


def test_not_differentiable_twice(served):
    served("reference")
    tensors, named, _ = site(VILT)
    _, n = ops.adapter_residual_norm(*tensors, spec=VILT, **named)
    (g,) = torch.autograd.grad(n.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="adapter_residual_norm: .* cannot be differentiated twice"):
        g.sum().backward()


def test_measured_on_the_cpu(monkeypatch):
    """fp32 in eager code: once per shape class, one launch against the composed ops; other dtypes are not measured."""
    if not backends.verify("site", "cpp", "cpu", torch.float32)[0]:
        pytest.skip("fastpetl._C has no cpu_site_forward")
    monkeypatch.delenv("FASTPETL_BACKEND", raising=False)
    monkeypatch.setenv("FASTPETL_TUNE", "1")
    backends.forget()
    tensors, named, _ = site(VILT)
    for _ in range(2):
        ops.adapter_residual_norm(*tensors, spec=VILT, **named)
    (found,) = (t for key, t in backends.tuned().items() if key[0] == "site+backward")
    assert set(found.milliseconds) == {"cpp", "composed"} and not found.rejected
    tensors, named, _ = site(VILT, dtype=torch.bfloat16)
    ops.adapter_residual_norm(*tensors, spec=VILT, **named)
    assert len([key for key in backends.tuned() if key[0].startswith("site")]) == 1


# --- compiled code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
def test_opcheck(label):
    op, back = torch.ops.fastpetl.site.default, torch.ops.fastpetl.site_backward.default
    for name, config in (("vilt", (True, 1e-5, 1, 1.0, 1, 1e-6)), ("vlt5", (True, 1e-5, 3, 0.7, 2, 1e-6))):
        a = arguments(5, 40, 8, name)
        with launcher(label) as backend:
            opcheck(op, (*(a[k] for k in NAMES), *config, name == "vilt", True, backend))
            if label == "triton" and DEVICE == "cpu":
                return  # its interpreter is slow
            plain = {k: None if t is None else t.detach() for k, t in a.items()}
            opcheck(op, (*plain.values(), *config, False, False, backend))
            s, _, z, stats, tail_stats = op(*plain.values(), *config, True, True, backend)
            t, g = plain, torch.randn(5, 40).to(s)
            saved = (s, tail_stats, t["tail_weight"], t["x"], z, stats, t["w_down"], t["w_up"], t["norm_weight"])
            rest = (t["norm_bias"], config[0], *config[2:5])
            for g_s, g_n, needs in ((g, g, 0b110011111), (None, g, 0b000000001), (g, None, 0b100000010)):
                opcheck(back, (g_s, g_n, *saved, *rest, needs, backend))


@pytest.mark.parametrize("label", [label for label in LABELS if label != "composed"])
@pytest.mark.parametrize("name", ["vilt", "vlbart"])
def test_compiled_trains_without_recompiling(served, label, name):
    spec = INSIDE[name]
    tensors, named, _ = site(spec)

    def block(x, f):
        out = ops.adapter_residual_norm(x, f, *tensors[2:], spec=spec, **named)
        return (out[0] * out[1]).sum() if isinstance(out, tuple) else out.square().sum()

    with launcher(label) as backend:
        served(backend)
        torch._dynamo.reset()
        counters.clear()
        compiled, graphs = torch.compile(block, fullgraph=True, backend="aot_eager"), []
        for shape in ((2, 7), (3, 9), (5, 6), (4, 11)):
            x, f = (torch.randn(*shape, 64, requires_grad=True) for _ in range(2))
            wanted = [t for t in (x, f, *tensors[2:], *named.values()) if t is not None]
            ours = torch.autograd.grad(compiled(x, f), wanted)
            for o, w in zip(ours, torch.autograd.grad(block(x, f), wanted), strict=True):
                torch.testing.assert_close(o, w, rtol=1e-4, atol=2e-4)
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[1:] == [graphs[1]] * 3 and graphs[1] <= 2
        program = torch.export.export(Wrapped(spec, tensors[2:], named), (x, f), strict=False)
    assert any("fastpetl.site.default" in str(node.target) for node in program.graph.nodes)


class Wrapped(torch.nn.Module):
    def __init__(self, spec, weights, named):
        super().__init__()
        self.spec = spec
        self.w = torch.nn.ParameterList([t.detach() for t in weights])
        self.n = torch.nn.ParameterDict({k: t.detach() for k, t in named.items() if t is not None})

    def forward(self, x, f):
        return ops.adapter_residual_norm(x, f, *self.w, spec=self.spec, **dict(self.n.items()))


def test_a_gradient_without_saved_tensors_is_refused():
    a = arguments(5, 40, 8, "vilt")
    config = (True, 1e-5, 1, 1.0, 1, 1e-6, True, False, "reference")
    n = torch.ops.fastpetl.site(*(a[k] for k in NAMES), *config)[1]
    with pytest.raises(RuntimeError, match="site: save is False but a gradient is wanted"):
        n.sum().backward()
