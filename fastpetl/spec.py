"""What one fused adapter site is, in one value that is checked once."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

__all__ = ["ACTIVATIONS", "AdapterSpec", "activation_code"]

# The numbers are the ABI between Python, C++ (csrc/cpu), CUDA and Triton (kernels/): append, never renumber.
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def activation_code(activation, function: str = "adapter") -> int:
    """Semantics: the kernels' number of an activation name; ValueError naming `function` if there is none."""
    code = ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if code is None:
        raise ValueError(f"{function}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return code


@dataclass(frozen=True)
class AdapterSpec:
    """Semantics: y = scale * (act(n(x) w_down^T + b_down) w_up^T + b_up) + residuals, n = LayerNorm or identity.

    x [rows, hidden], w_down [bottleneck, hidden], w_up [hidden, bottleneck]. `add_x`: x itself is one of the residuals;
    `residuals` counts the others (at most 2). Checked on construction; ValueError says which field, what it is and what
    was expected.
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

    def __post_init__(self):
        activation_code(self.activation, "AdapterSpec")
        for field in ("hidden", "bottleneck"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"AdapterSpec: {field} is {value!r}, expected an integer of at least 1")
        for field in ("scale", "eps"):
            value = getattr(self, field)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"AdapterSpec: {field} is {value!r}, expected a number")
        if not self.eps >= 0:
            raise ValueError(f"AdapterSpec: eps is {self.eps!r}, expected a number of at least 0")
        if not isinstance(self.residuals, int) or not 0 <= self.residuals <= 2:
            raise ValueError(f"AdapterSpec: residuals is {self.residuals!r}, expected 0, 1 or 2 (beside x itself)")
        if self.norm_bias and not self.norm:
            raise ValueError("AdapterSpec: norm_bias is True without norm, expected norm=True or norm_bias=False")

    @property
    def code(self) -> int:
        """The kernels' number of the activation."""
        return ACTIVATIONS[self.activation]

    @property
    def parameters(self) -> int:
        """Number of parameters: 2 d r + r + d + 2 d for biases and norm present."""
        d, r = self.hidden, self.bottleneck
        return 2 * d * r + r * self.down_bias + d * self.up_bias + d * (self.norm + self.norm_bias)

    def macs(self, rows: int) -> int:
        """Multiply-accumulates of one forward over `rows` rows (the two GEMMs)."""
        return 2 * rows * self.hidden * self.bottleneck
