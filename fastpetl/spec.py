"""What one fused adapter site is, in one value that is checked once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from numbers import Real

__all__ = ["ACTIVATIONS", "EMITS", "INPUTS", "TAILS", "AdapterSpec", "activation_code", "check_tail", "site_config"]

# The numbers are the ABI between Python, C++ (csrc/cpu), CUDA and Triton (kernels/): append, never renumber.
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
INPUTS = {"residual": 0, "sublayer": 1, "normalised": 2}  # what a site's adapter reads
TAILS = {None: 0, "layernorm": 1, "rmsnorm": 2}  # the norm behind the residual sum
EMITS = {"sum": 1, "norm": 2, "both": 3}  # bits: 1 the sum, 2 its norm


def activation_code(activation, function: str = "adapter") -> int:
    """Semantics: the kernels' number of an activation name; ValueError naming `function` if there is none."""
    code = ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if code is None:
        raise ValueError(f"{function}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return code


def _one_of(function: str, name: str, value, table) -> None:
    if not (value is None or isinstance(value, str)) or value not in table:
        raise ValueError(f"{function}: {name} is {value!r}, expected one of {', '.join(map(str, table))}")


def check_tail(function: str, name: str, tail, emit, dropout) -> None:
    """Semantics: ValueError naming `function` unless tail (called `name`), emit and dropout go together."""
    _one_of(function, name, tail, TAILS)
    _one_of(function, "emit", emit, EMITS)
    if (tail is None) != (emit == "sum"):
        expected = "'sum'" if tail is None else "'norm' or 'both'"
        raise ValueError(f"{function}: emit is {emit!r} with {name}={tail!r}, expected {expected}")
    if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"{function}: dropout is {dropout!r}, expected a number in [0, 1)")


@dataclass(frozen=True)
class AdapterSpec:
    """Semantics: y = scale * (act(n(x) w_down^T + b_down) w_up^T + b_up) + residuals, n = LayerNorm or identity.

    x [rows, hidden], w_down [bottleneck, hidden], w_up [hidden, bottleneck]. `add_x`: x itself is one of the residuals;
    `residuals` counts the others (at most 2).

    The fields from `input` on say the rest of a site (`ops.adapter_residual_norm`, where x is always a residual:
    `add_x` and `residuals` say nothing there): what the adapter reads (the residual stream x, the sublayer output f, or
    the normalised input), whether it is added before or after the tail norm, that norm and its eps, which of the sum
    and its norm come out, and the dropout on the sublayer output. Checked on construction; ValueError says which
    field, what it is and what was expected.
    """

    hidden: int
    bottleneck: int
    activation: str = "relu"
    scale: float = 1.0
    eps: float = 1e-5
    norm: bool = True
    norm_bias: bool = True
    down_bias: bool = True
    up_bias: bool = True
    add_x: bool = True
    residuals: int = 0
    input: str = "residual"
    placement: str = "inside"
    tail: str | None = None
    tail_eps: float = 1e-5
    emit: str = "sum"
    dropout: float = 0.0

    def __post_init__(self):
        activation_code(self.activation, "AdapterSpec")
        for field in ("hidden", "bottleneck"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"AdapterSpec: {field} is {value!r}, expected an integer of at least 1")
        for field in ("scale", "eps", "tail_eps"):
            value = getattr(self, field)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"AdapterSpec: {field} is {value!r}, expected a number")
        for field in ("eps", "tail_eps"):
            value = getattr(self, field)
            if not value >= 0:
                raise ValueError(f"AdapterSpec: {field} is {value!r}, expected a number of at least 0")
        if not isinstance(self.residuals, int) or not 0 <= self.residuals <= 2:
            raise ValueError(f"AdapterSpec: residuals is {self.residuals!r}, expected 0, 1 or 2 (beside x itself)")
        if self.norm_bias and not self.norm:
            raise ValueError("AdapterSpec: norm_bias is True without norm, expected norm=True or norm_bias=False")
        _one_of("AdapterSpec", "input", self.input, INPUTS)
        _one_of("AdapterSpec", "placement", self.placement, ("inside", "after"))
        check_tail("AdapterSpec", "tail", self.tail, self.emit, self.dropout)
        if self.placement == "after" and (self.tail is None or self.input == "sublayer"):
            raise ValueError(
                f"AdapterSpec: placement is 'after' with tail={self.tail!r} and input={self.input!r}, expected a tail "
                "norm and the input residual or normalised"
            )

    @property
    def code(self) -> int:
        """The kernels' number of the activation."""
        return ACTIVATIONS[self.activation]

    @functools.cached_property
    def config(self) -> tuple:
        """What the launchers of a site with a norm behind it take: (add_x, eps, activation, scale, tail, tail's eps, is
        the sum wanted).
        """
        return site_config(self)

    @functools.cached_property
    def shapes(self) -> tuple:
        """Those of (w_down, b_down, w_up, b_up, norm_weight, norm_bias), None for one that is not there."""
        d, r = self.hidden, self.bottleneck
        norm, norm_bias = ((d,) if there else None for there in (self.norm, self.norm_bias))
        return (r, d), ((r,) if self.down_bias else None), (d, r), ((d,) if self.up_bias else None), norm, norm_bias

    @property
    def parameters(self) -> int:
        """Number of parameters: 2 d r + r + d + 2 d for biases and norm present."""
        d, r = self.hidden, self.bottleneck
        return 2 * d * r + r * self.down_bias + d * self.up_bias + d * (self.norm + self.norm_bias)

    def macs(self, rows: int) -> int:
        """Multiply-accumulates of one forward over `rows` rows (the two GEMMs)."""
        return 2 * rows * self.hidden * self.bottleneck


def site_config(spec: AdapterSpec) -> tuple:
    """`spec.config`, a function for compiled code: Dynamo calls no method of a frozen dataclass."""
    tail = TAILS[spec.tail], spec.tail_eps
    return spec.input != "normalised", spec.eps, spec.code, float(spec.scale), *tail, spec.emit == "both"
