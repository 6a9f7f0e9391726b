"""VL-Adapter's Compacter and low-rank adapters: bottlenecks whose projections are made of fewer parameters.

Source: `HyperComplexAdapter`, `PHMLinear` and `LowRankAdapter` of ylsung/VL_adapter (CVPR 2022), after Compacter
(NeurIPS 2021); parameter names are theirs.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.adapter import ACTIVATIONS
from fastpetl.nn.inline import Inlined, structure


class PHMLinear(nn.Module):
    """Semantics: y = x H^T + b, H[c out' + q, a in' + k] = sum_i rule[i, a, c] W[i, k, q]; x [..., in], y [..., out].

    n = division divides both sizes, in' = in / n, out' = out / n. rule: `phm_rule` [n, n, n], or with factorized_rule
    `phm_rule_left` [n, n, 1] times `phm_rule_right` [n, 1, n]. W: `W` [n, in', out'], or with `rank` k `W_left`
    [n, in', k] times `W_right` [n, k, out']. Drawn as the original does: W glorot uniform with gain sqrt(2), the rule
    N(0, init_range), b zeros.
    """

    def __init__(self, inputs, outputs, division, *, rank=None, factorized_rule=False, init_range=0.01, **made):
        super().__init__()
        n = self.division = division
        if inputs % n or outputs % n:
            raise ValueError(f"PHMLinear: division is {n}, expected a divisor of in={inputs} and out={outputs}")

        def drawn(name, *shape):
            parameter = nn.Parameter(torch.empty(*shape, **made))
            for matrix in parameter.data:
                nn.init.xavier_uniform_(matrix, gain=2**0.5)
            self.register_parameter(name, parameter)

        pair = (("phm_rule_left", n, n, 1), ("phm_rule_right", n, 1, n))
        for name, *shape in pair if factorized_rule else (("phm_rule", n, n, n),):
            self.register_parameter(name, nn.Parameter(torch.empty(*shape, **made).normal_(std=init_range)))
        if rank is None:
            drawn("W", n, inputs // n, outputs // n)
        else:
            drawn("W_left", n, inputs // n, rank)
            drawn("W_right", n, rank, outputs // n)
        self.b = nn.Parameter(torch.zeros(outputs, **made))

    def parts(self) -> tuple:
        """(rule, W) as `ops.phm_weights` takes them: tensors, or pairs whose product they are."""
        # By attribute: in DataParallel's replicas parameters are nothing else.
        rule = self.phm_rule if hasattr(self, "phm_rule") else (self.phm_rule_left, self.phm_rule_right)
        return rule, self.W if hasattr(self, "W") else (self.W_left, self.W_right)

    def forward(self, x):
        from fastpetl.ops import phm_weights_reference

        rule, weight = self.parts()
        return F.linear(x, phm_weights_reference([rule], [weight])[0], self.b)

    def extra_repr(self) -> str:
        return f"division={self.division}"


class LowRankLinear(nn.Module):
    """Semantics: y = x W_left W_right + b; W_left [in, k], W_right [k, out]; glorot uniform with gain sqrt(2), b
    zeros.
    """

    def __init__(self, inputs, outputs, rank, **made):
        super().__init__()
        self.W_left, self.W_right = (nn.Parameter(torch.empty(*s, **made)) for s in ((inputs, rank), (rank, outputs)))
        for weight in (self.W_left, self.W_right):
            nn.init.xavier_uniform_(weight, gain=2**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, **made))

    def forward(self, x):
        return F.linear(x, (self.W_left @ self.W_right).t(), self.b)


class _Adapter(nn.Module):
    """Semantics: U(x) = act(down_sampler(x)) through up_sampler."""

    def __init__(self, down_sampler: nn.Module, up_sampler: nn.Module, activation: str):
        super().__init__()
        self.activation = activation
        self.down_sampler, self.up_sampler = down_sampler, up_sampler

    def forward(self, x):
        return self.up_sampler(ACTIVATIONS[self.activation](self.down_sampler(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class CompacterAdapter(_Adapter):
    """Semantics: U(x) = act(x H_down^T + b_down) H_up^T + b_up, H of `PHMLinear`s: one task's Compacter."""

    structure = structure(down_sampler=PHMLinear, up_sampler=PHMLinear)

    def weights(self) -> tuple:
        """(w_down, b_down, w_up, b_up) as plain matrices, both in one launch."""
        from fastpetl.ops import phm_weights

        down, up = self.down_sampler, self.up_sampler
        rules, matrices = zip(down.parts(), up.parts(), strict=True)
        h_down, h_up = phm_weights(list(rules), list(matrices))
        return h_down, down.b, h_up, up.b


class LowRankAdapter(_Adapter):
    """Semantics: U(x) = act(x W_down + b_down) W_up + b_up, W of `LowRankLinear`s."""

    structure = structure(down_sampler=LowRankLinear, up_sampler=LowRankLinear)

    def weights(self) -> tuple:
        """(w_down, b_down, w_up, b_up) as plain matrices."""
        down, up = self.down_sampler, self.up_sampler
        return (down.W_left @ down.W_right).t(), down.b, (up.W_left @ up.W_right).t(), up.b


INLINED = {kind: Inlined(kind, kind.structure) for kind in (CompacterAdapter, LowRankAdapter)}
