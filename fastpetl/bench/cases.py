"""The workloads of the op benchmarks: each op of the kernel family at the sizes of the papers' models.

One table serves `bench ops`, the pytest-benchmark tests and the GPU suite. A case builds inputs, the formula as one
writes it in torch, and the same through an op of ours; its floor is the bytes a perfect kernel moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Size:
    """Rows and width of the activations; `tasks` and `layers` where an op is about several."""

    rows: int = 2248
    hidden: int = 768
    batch: int = 8
    tasks: int = 4
    layers: int = 12
    lora: int = 128


TINY = Size(rows=24, hidden=32, batch=4, tasks=2, layers=2, lora=8)


class Maker:
    """Random tensors of one dtype and device from a fixed seed."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, std=1.0, mean=0.0, grad=True) -> torch.Tensor:
        made = torch.randn(shape, generator=self.generator) * std + mean
        return made.to(self.device, self.dtype).requires_grad_(grad)

    def adapter(self, d: int, r: int) -> tuple[torch.Tensor, ...]:
        """Semantics: w_down, b_down, w_up, b_up."""
        return self(r, d, std=0.05), self(r, std=0.1), self(d, r, std=0.05), self(d, std=0.1)

    def norm(self, d: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self(d, std=0.1, mean=1.0), self(d, std=0.1)


@dataclass
class Built:
    """One workload: `formula(*inputs)` is torch's way, `fused(backend)(*inputs)` ours; both give a tensor or a tuple.

    flop: of the forward. reads_writes: activations of `rows x hidden` that a perfect forward and a perfect backward
    move; extra_bytes: what else they do, such as weights.
    """

    inputs: tuple
    formula: Callable
    fused: Callable[[str], Callable]
    flop: float
    reads_writes: tuple[float, float]
    extra_bytes: float = 0.0
    rivals: dict[str, Callable] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A named workload of an op; `bars`: mode -> (against eager, against compile), fp32 on a CPU."""

    name: str
    op: str
    build: Callable[[Size, Maker], Built]
    bars: dict = field(default_factory=dict)


CASES: list[Case] = []
GRADS = "forward+backward"


def case(name: str, op: str, **bars):
    """Registers the decorated builder; bars forward=(eager, compile), both=(eager, compile)."""

    def register(build):
        named = {{"forward": "forward", "both": GRADS}[mode]: bar for mode, bar in bars.items()}
        CASES.append(Case(name, op, build, named))
        return build

    return register


def adapter_of(r: int):
    """Semantics: a builder of the ViLT adapter of that bottleneck, without the norm behind it."""

    def build(size: Size, make: Maker) -> Built:
        from fastpetl.ops import adapter

        n, d = size.rows, size.hidden

        def formula(x, f, w_down, b_down, w_up, b_up, gamma, beta):
            h = F.relu(F.linear(F.layer_norm(x, (d,), gamma, beta), w_down, b_down))
            return x + f + F.linear(h, w_up, b_up)

        def fused(backend):
            def run(x, f, w_down, b_down, w_up, b_up, gamma, beta):
                norm = {"norm_weight": gamma, "norm_bias": beta}
                return adapter(x, w_down, b_down, w_up, b_up, **norm, residuals=(x, f), backend=backend)

            return run

        inputs = (make(n, d), make(n, d), *make.adapter(d, r), *make.norm(d))
        return Built(inputs, formula, fused, 4.0 * n * d * r, (3, 3))

    return build


for _r, _bars in ((48, {}), (96, {"forward": (2.2, 2.2), "both": (2.3, 2.3)}), (192, {}), (288, {})):
    case(f"adapter/r{_r}", "adapter", **_bars)(adapter_of(_r))


# --- sites: what lies between two GEMMs -------------------------------------------------------------------------------


def _site(spec: dict, formula, adapters: float, passes: tuple[float, float], bottleneck: int = 96):
    """Semantics: a builder of an `adapter_residual_norm` site with own norm iff the spec has one."""

    def build(size: Size, make: Maker) -> Built:
        from fastpetl.ops import adapter_residual_norm, adapter_residual_norm_reference
        from fastpetl.spec import AdapterSpec

        n, d, r = size.rows, size.hidden, min(bottleneck, size.hidden)
        whole = AdapterSpec(d, r, **spec)
        own = make.norm(d) if whole.norm else ()
        tail = make.norm(d)[: 2 if whole.tail == "layernorm" else 1]

        def fused(backend):
            def run(x, f, w_down, b_down, w_up, b_up, *norms):
                norms = iter(norms)
                named = {"norm_weight": next(norms), "norm_bias": next(norms)} if whole.norm else {}
                named["tail_weight"], named["tail_bias"] = next(norms), next(norms, None)
                if backend == "reference":
                    return adapter_residual_norm_reference(x, f, w_down, b_down, w_up, b_up, spec=whole, **named)
                return adapter_residual_norm(x, f, w_down, b_down, w_up, b_up, spec=whole, **named, backend=backend)

            return run

        inputs = (make(n, d), make(n, d), *make.adapter(d, r), *own, *tail)
        return Built(inputs, formula, fused, adapters * 4.0 * n * d * r, passes)

    return build


def _vilt_site(x, f, w_down, b_down, w_up, b_up, gamma, beta, tail_gamma, tail_beta):
    d = x.shape[-1:]
    s = x + f + F.linear(F.relu(F.linear(F.layer_norm(x, d, gamma, beta), w_down, b_down)), w_up, b_up)
    return s, F.layer_norm(s, d, tail_gamma, tail_beta, 1e-6)


def _meter_site(x, f, w_down, b_down, w_up, b_up, gamma, beta, tail_gamma, tail_beta):
    return _vilt_site(x, f, w_down, b_down, w_up, b_up, gamma, beta, tail_gamma, tail_beta)[1]


def _vlbart_site(x, f, w_down, b_down, w_up, b_up, tail_gamma, tail_beta):
    a = F.linear(F.gelu(F.linear(f, w_down, b_down), approximate="tanh"), w_up, b_up)
    return F.layer_norm(x + (f + a), x.shape[-1:], tail_gamma, tail_beta)


def _vlt5_site(x, f, w_down, b_down, w_up, b_up, tail_gamma):
    s = x + (f + F.linear(F.gelu(F.linear(f, w_down, b_down), approximate="tanh"), w_up, b_up))
    return s, s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6) * tail_gamma


_PARALLEL = {"tail": "layernorm", "tail_eps": 1e-6, "emit": "both"}
_SEQUENTIAL = {"activation": "gelu_tanh", "norm": False, "norm_bias": False, "input": "sublayer"}


def site_of(r: int):
    """Semantics: a builder of the ViLT site of that bottleneck: the adapter and the norm behind it."""
    return _site(_PARALLEL, _vilt_site, 1, (4, 4), r)


_SITE_BARS = {"both": (2.3, 2.3)}
case("site/vilt", "site", **_SITE_BARS)(site_of(96))
case("site/meter", "site", **_SITE_BARS)(_site({**_PARALLEL, "emit": "norm"}, _meter_site, 1, (3, 4)))
case("site/vlbart", "site", **_SITE_BARS)(
    _site({**_SEQUENTIAL, "tail": "layernorm", "emit": "norm"}, _vlbart_site, 1, (3, 5))
)
case("site/vlt5", "site", **_SITE_BARS)(
    _site({**_SEQUENTIAL, "tail": "rmsnorm", "tail_eps": 1e-6, "emit": "both"}, _vlt5_site, 1, (4, 6))
)


@case("residual_norm", "residual_norm", both=(1.5, 1.3))
def _residual_norm(size: Size, make: Maker) -> Built:
    from fastpetl.ops import residual_norm

    n, d = size.rows, size.hidden

    def formula(x, f, gamma, beta):
        s = x + f
        return s, F.layer_norm(s, (d,), gamma, beta)

    def fused(backend):
        return lambda x, f, gamma, beta: residual_norm(x, f, gamma, beta, backend=backend)

    return Built((make(n, d), make(n, d), *make.norm(d)), formula, fused, 8.0 * n * d, (4, 4))


# --- adapters of several tasks, generated weights, low rank -----------------------------------------------------------


def _gelu_adapter(x, w_down, b_down, w_up, b_up):
    return x + F.linear(F.gelu(F.linear(x, w_down, b_down), approximate="tanh"), w_up, b_up)


@case("multi_adapter/4tasks", "adapter", both=(1.5, 1.3))
def _multi(size: Size, make: Maker) -> Built:
    from fastpetl.ops import multi_adapter, multi_adapter_reference

    t, d, r, rows = size.tasks, size.hidden, min(96, size.hidden), size.rows // size.batch
    ids = torch.arange(size.batch, device=make.device) % t
    stacks = (make(t, r, d, std=0.05), make(t, r, std=0.1), make(t, d, r, std=0.05), make(t, d, std=0.1))

    def formula(x, *w):
        y = torch.empty_like(x)
        for i in range(t):  # what one writes: each task's samples through its adapter
            chosen = ids == i
            y[chosen] = _gelu_adapter(x[chosen], *(s[i] for s in w))
        return y

    def fused(backend):
        if backend == "reference":
            return lambda x, *w: multi_adapter_reference(x, *w, ids, residuals=(x,))
        return lambda x, *w: multi_adapter(x, *w, ids, residuals=(x,), backend=backend)

    inputs = (make(size.batch, rows, d), *stacks)
    return Built(inputs, formula, fused, 4.0 * size.batch * rows * d * r, (2, 3))


@case("phm_adapter/n2", "phm", both=(1.5, 1.3))
def _phm(size: Size, make: Maker) -> Built:
    from fastpetl.ops import phm_adapter, phm_weights, phm_weights_reference

    n, d, r = 2, size.hidden, min(96, size.hidden)
    rules = [make(n, n, n, std=0.5) for _ in range(2)]
    weights = [make(n, d // n, r // n, std=0.05), make(n, r // n, d // n, std=0.05)]

    def formula(x, rule_down, rule_up, w_down, w_up, b_down, b_up):
        def product(x, rule, w, b):  # as Compacter's code has it
            h = torch.einsum("bac,bkp->bakcp", rule, w).reshape(n, n * w.shape[1], n * w.shape[2]).sum(0)
            return x @ h + b

        return x + product(F.gelu(product(x, rule_down, w_down, b_down), approximate="tanh"), rule_up, w_up, b_up)

    def fused(backend):
        def run(x, rule_down, rule_up, w_down, w_up, b_down, b_up):
            if backend == "reference":
                down, up = phm_weights_reference([rule_down, rule_up], [w_down, w_up])
            else:
                down, up = phm_weights([rule_down, rule_up], [w_down, w_up], backend=backend)
            return phm_adapter(x, down, b_down, up, b_up, residuals=(x,))

        return run

    inputs = (make(size.rows, d), *rules, *weights, make(r, std=0.1), make(d, std=0.1))
    return Built(inputs, formula, fused, 4.0 * size.rows * d * r, (2, 3))


@case("hyper_adapter", "adapter", both=(1.5, 1.3))
def _hyper(size: Size, make: Maker) -> Built:
    from fastpetl.ops import hyper_adapter, hyper_adapter_reference, hyper_weights

    p, d, r, layers = 8, size.hidden, min(96, size.hidden), size.layers
    rows = size.rows // layers  # all layers' adapters on as many rows together as the other cases have
    generators = [make(n, p, std=0.02) for n in (r * d, r, d * r, d)]

    def formula(x, e, *w):
        for i in range(layers):  # one matrix-vector product per layer and tensor, as the original
            down, b_down, up, b_up = (F.linear(e[i], g) for g in w)
            x = _gelu_adapter(x, down.view(r, d), b_down, up.view(d, r), b_up)
        return x

    def fused(backend):
        def run(x, e, down, b_down, up, b_up):
            made = hyper_weights(e, ((down, None), (b_down, None)), ((up, None), (b_up, None)))
            for i in range(layers):
                if backend == "reference":
                    x = hyper_adapter_reference(x, made[i], residuals=(x,))
                else:
                    x = hyper_adapter(x, made[i], residuals=(x,), backend=backend)
            return x

        return run

    inputs = (make(rows, d), make(layers, p), *generators)
    return Built(
        inputs, formula, fused, layers * 4.0 * rows * d * r, (2, 3), 2.0 * layers * r * d * make.dtype.itemsize
    )


@case("lora_linear/qkv", "adapter", both=(1.5, 1.3))
def _lora(size: Size, make: Maker) -> Built:
    from fastpetl.ops import lora_linear, lora_linear_reference

    d, r = size.hidden, size.lora
    frozen = [make(d, d, std=0.03, grad=False) for _ in range(3)]
    biases = [make(d, std=0.1, grad=False) for _ in range(3)]

    def formula(x, a_q, b_q, a_v, b_v):
        q, k, v = (F.linear(x, w.to(x.dtype), b.to(x.dtype)) for w, b in zip(frozen, biases, strict=True))
        return q + F.linear(F.linear(x, a_q), b_q) * 0.25, k, v + F.linear(F.linear(x, a_v), b_v) * 0.25

    def fused(backend):
        def run(x, a_q, b_q, a_v, b_v):
            w, b = ([t.to(x.dtype) for t in ts] for ts in (frozen, biases))
            lora = (a_q, None, a_v), (b_q, None, b_v)
            if backend == "reference":
                return lora_linear_reference(x, w, b, *lora, scale=0.25)
            return lora_linear(x, w, b, *lora, scale=0.25, backend=backend)

        return run

    inputs = (make(size.rows, d), *(make(*s, std=0.05) for s in ((r, d), (d, r)) * 2))
    flop = 2.0 * size.rows * d * (3 * d + 4 * r)
    return Built(inputs, formula, fused, flop, (4, 4), 3.0 * d * d * make.dtype.itemsize)
