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


def _adapter(r: int):
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
    case(f"adapter/r{_r}", "adapter", **_bars)(_adapter(_r))


# --- sites: what lies between two GEMMs -------------------------------------------------------------------------------


def _site(spec: dict, formula, adapters: float, passes: tuple[float, float]):
    """Semantics: a builder of an `adapter_residual_norm` site with own norm iff the spec has one."""

    def build(size: Size, make: Maker) -> Built:
        from fastpetl.ops import adapter_residual_norm, adapter_residual_norm_reference
        from fastpetl.spec import AdapterSpec

        n, d, r = size.rows, size.hidden, min(96, size.hidden)
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
_SITE_BARS = {"both": (2.3, 2.3)}
case("site/vilt", "residual_norm", **_SITE_BARS)(_site(_PARALLEL, _vilt_site, 1, (4, 4)))
case("site/meter", "residual_norm", **_SITE_BARS)(_site({**_PARALLEL, "emit": "norm"}, _meter_site, 1, (3, 4)))
case("site/vlbart", "residual_norm", **_SITE_BARS)(
    _site({**_SEQUENTIAL, "tail": "layernorm", "emit": "norm"}, _vlbart_site, 1, (3, 5))
)
case("site/vlt5", "residual_norm", **_SITE_BARS)(
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
