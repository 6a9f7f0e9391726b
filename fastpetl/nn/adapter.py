"""The bottleneck adapter of DAS: in plain torch, and the subclass `fastpetl.patch` swaps in.

Source: `Adapter_Layer` / `ParallelAdapter` of DoubtedSteam/DAS (NeurIPS 2023); parameter names are theirs.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.inline import Inlined, call_reason, note_fallback, structure, weight_and_bias

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class BottleneckAdapter(nn.Module):
    """Semantics: A(x) = scale * (act(LN(x) W_down^T + b_down) W_up^T + b_up); forward(x) = A(x) + x.

    x [..., hidden]. `forward(x, residual=f)` is A(x) + f, `forward(x, add_residual=False)` is A(x). LN has its own
    gain and bias and eps 1e-5; `norm=False` leaves it out. Initialised as in the original, which is not the identity:
    both weights N(0, 0.02), biases 0, LN (1, 0).
    """

    def __init__(
        self,
        hidden: int,
        bottleneck: int,
        *,
        activation: str = "relu",
        scale: float = 1.0,
        norm: bool = True,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (("hidden", hidden), ("bottleneck", bottleneck)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"BottleneckAdapter: {name} is {value!r}, expected an integer >= 1")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"BottleneckAdapter: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        made = {"device": device, "dtype": dtype}
        self.activation = activation
        self.scale = float(scale)
        self.register_module("adapter_layer_norm_before", nn.LayerNorm(hidden, eps=eps, **made) if norm else None)
        self.down_proj = nn.Linear(hidden, bottleneck, **made)
        self.up_proj = nn.Linear(bottleneck, hidden, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.down_proj, self.up_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.adapter_layer_norm_before is not None:
            self.adapter_layer_norm_before.reset_parameters()

    def forward(self, x: torch.Tensor, add_residual: bool = True, residual: torch.Tensor | None = None) -> torch.Tensor:
        h = x if self.adapter_layer_norm_before is None else self.adapter_layer_norm_before(x)
        h = self.up_proj(ACTIVATIONS[self.activation](self.down_proj(h)))
        if self.scale != 1.0:
            h = h * self.scale
        if not add_residual:
            return h
        return h + (x if residual is None else residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, scale={self.scale}"


class FusedBottleneckAdapter(BottleneckAdapter):
    """`BottleneckAdapter` in one op: same numbers, same parameters. Made by `fastpetl.patch`, never constructed."""

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def forward(self, x: torch.Tensor, add_residual: bool = True, residual: torch.Tensor | None = None) -> torch.Tensor:
        reason = call_reason(self, adapter_structure(self), x)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, add_residual, residual)
        residuals = () if not add_residual else (x if residual is None else residual,)
        from fastpetl.backends import for_op

        return fused_adapter(self, x, residuals, for_op("adapter", self._fastpetl_backend))


FusedBottleneckAdapter.__name__ = BottleneckAdapter.__name__  # accelerate and others match modules by class name

_WITH_NORM = structure(adapter_layer_norm_before=nn.LayerNorm, down_proj=nn.Linear, up_proj=nn.Linear)
_WITHOUT_NORM = structure(down_proj=nn.Linear, up_proj=nn.Linear)
INLINED_ADAPTER = Inlined((BottleneckAdapter, FusedBottleneckAdapter), _WITH_NORM)


def adapter_structure(adapter: BottleneckAdapter) -> dict[str, Inlined]:
    """What a fused adapter reads past its children's forward."""
    return _WITHOUT_NORM if adapter._modules["adapter_layer_norm_before"] is None else _WITH_NORM


def fused_adapter(adapter, x: torch.Tensor, residuals: tuple, backend: str, activation=None) -> torch.Tensor:
    """Semantics: A(x) + sum(residuals) from the parameters of a BottleneckAdapter, or an original with its names,
    without calling its children. activation: for an original, which has no such attribute.
    """
    from fastpetl import ops

    norm, (norm_weight, norm_bias), _, down, up = _read(adapter)
    return ops.adapter(
        x,
        *down,
        *up,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=1e-5 if norm is None else norm.eps,
        activation=activation or adapter.activation,
        scale=adapter.scale,
        residuals=residuals,
        backend=backend,
    )


def fused_site(adapter, x, f, norm: nn.LayerNorm, emit: str, backend: str, activation=None, keep: str = "sum"):
    """Semantics: s = x + f + A(x), n = norm(s): (s, n), or n where emit is "norm"; in one launch where a backend has
    one. The adapter as in `fused_adapter`; nothing is dropped here. keep: see `ops.adapter_residual_norm`.
    """
    from fastpetl import ops

    own, (norm_weight, norm_bias), linear, down, up = _read(adapter)
    spec = site_spec(
        linear.in_features,
        linear.out_features,
        activation or adapter.activation,
        adapter.scale,
        None if own is None else (own.eps, norm_bias is not None),
        (down[1] is not None, up[1] is not None),
        norm.eps,
        emit,
    )
    tail_weight, tail_bias = weight_and_bias(norm)
    return ops.adapter_residual_norm(
        x,
        f,
        *down,
        *up,
        spec=spec,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        tail_weight=tail_weight,
        tail_bias=tail_bias,
        backend=backend,
        keep=keep,
    )


def _read(adapter) -> tuple:
    """(norm or None, its weight and bias, the down projection, its weight and bias, the up projection's)."""
    children = adapter._modules
    norm, down = children.get("adapter_layer_norm_before"), children["down_proj"]
    norms = (None, None) if norm is None else weight_and_bias(norm)
    return norm, norms, down, weight_and_bias(down), weight_and_bias(children["up_proj"])


def site_spec(*description):
    """Semantics: the specification of an adapter site with a norm behind it; made, and so checked, once for all layers
    that are alike. A constant to Dynamo.
    """
    return _site_spec(*description)


site_spec._dynamo_marked_constant = True


@functools.lru_cache(maxsize=64)
def _site_spec(hidden, bottleneck, activation, scale, own, biases, tail_eps, emit, input="residual"):
    from fastpetl.spec import AdapterSpec

    eps, own_bias = own or (1e-5, False)
    return AdapterSpec(
        hidden,
        bottleneck,
        activation,
        scale,
        eps,
        norm=own is not None,
        norm_bias=own_bias,
        down_bias=biases[0],
        up_bias=biases[1],
        input=input,
        tail="layernorm",
        tail_eps=tail_eps,
        emit=emit,
    )
