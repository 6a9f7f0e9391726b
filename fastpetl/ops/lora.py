"""LoRA: frozen linears with trainable low-rank updates, and merging them for inference.

Floor of a branch: its low-rank products, 2 rows r (in + out) multiply-adds, and one read of x; the update is added
where the adapter kernel writes, so that the base output is read and written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import check_input, check_like, first_order, needs_grad, number, rows, through_dispatcher
from ._dropout import dropout_factor, dropped
from ._linear import NONE, run_backward
from .adapter import adapter
from .linear import linear
from .residual_norm import check_seed

__all__ = ["lora_linear", "lora_linear_reference", "lora_weight", "merge_lora"]

_APART = 0x5851F42D4C957  # far apart: sites with consecutive seeds share no mask


def lora_linear(x, weights, biases, lora_a, lora_b, *, scale=1.0, dropout=0.0, seed=None, backend="auto"):
    """Semantics: y_i = x W_i^T + b_i + scale * (drop_i(x) A_i^T) B_i^T, for all i; the last term only where A_i is
    given.

    x [..., in]; weights: a tuple of W_i [out_i, in], frozen or not; biases: a tuple of b_i [out_i] or None; lora_a,
    lora_b: tuples of A_i [r_i, in] and B_i [out_i, r_i], both None for a plain linear (k of q, k, v). Returns a tuple.
    dropout: on x in each branch, a Philox mask of its own (see `residual_norm`); seed int64 of one element.
    Gradients: for x, A, B, and for W and b where they want them. backend: that of `adapter`, which computes square
    branches; others run in torch, and so does dropout. Source: VL-Adapter `LoRALinearController`
    (vl_adapter.md 1.6), loralib.
    """

    def branch(base, u, a, b):
        if b.shape[0] != a.shape[1]:
            return base + F.linear(F.linear(u, a), b) * scale
        return adapter(u, a, None, b, None, activation="identity", scale=scale, residuals=(base,), backend=backend)

    def base(weight, bias):
        if weight.requires_grad:
            return F.linear(x, weight, bias)
        return linear(x, (weight,), None if bias is None else (bias,))

    return _run(
        "lora_linear",
        x,
        weights,
        biases,
        lora_a,
        lora_b,
        number("lora_linear", "scale", scale),
        dropout,
        seed,
        base,
        branch,
    )


def lora_linear_reference(x, weights, biases, lora_a, lora_b, *, scale=1.0, dropout=0.0, seed=None):
    """Semantics: y_i = x W_i^T + b_i + scale * (drop_i(x) A_i^T) B_i^T, for all i; the last term only where A_i is
    given.

    Plain torch, the contract of `lora_linear`; any floating dtype. Rounds after each product, the scale and the sum.
    """
    f = "lora_linear_reference"
    return _run(
        f, x, weights, biases, lora_a, lora_b, number(f, "scale", scale), dropout, seed,
        lambda weight, bias: F.linear(x, weight, bias),
        lambda base, u, a, b: base + F.linear(F.linear(u, a), b) * scale,
    )  # fmt: skip


def _run(function, x, weights, biases, lora_a, lora_b, scale, dropout, seed, base, branch):
    _check(function, x, weights, biases, lora_a, lora_b, dropout, seed)
    out = []
    for i, (weight, bias, a, b) in enumerate(zip(weights, biases, lora_a, lora_b, strict=True)):
        y = base(weight, bias)
        if a is not None:
            u = x
            if dropout:
                factor = dropout_factor(seed + i * _APART, x[..., 0].numel(), x.shape[-1], dropout, x)
                u = dropped(x, factor.view(x.shape))
            y = branch(y, u, a, b)
        out.append(y)
    return tuple(out)


def _check(function, x, weights, biases, lora_a, lora_b, dropout, seed) -> None:
    check_input(function, "x", x)
    lists = (("weights", weights), ("biases", biases), ("lora_a", lora_a), ("lora_b", lora_b))
    for name, t in lists:
        if not isinstance(t, (tuple, list)):
            raise TypeError(f"{function}: {name} is a {type(t).__name__}, expected a tuple")
        if len(t) != len(weights) or not t:
            raise ValueError(
                f"{function}: {name} has {len(t)} entries, expected {max(len(weights), 1)}, one per weight"
            )
    for i, (w, bias, a, b) in enumerate(zip(weights, biases, lora_a, lora_b, strict=True)):
        if not isinstance(w, torch.Tensor) or w.dim() != 2 or w.shape[1] != x.shape[-1]:
            got = tuple(w.shape) if isinstance(w, torch.Tensor) else type(w).__name__
            raise ValueError(f"{function}: weights[{i}] is {got}, expected (out, in={x.shape[-1]}) to match x")
        check_like(function, f"weights[{i}]", w, w.shape, "", x)
        if bias is not None:
            check_like(function, f"biases[{i}]", bias, w.shape[:1], f"(out={w.shape[0]},) to match weights[{i}]", x)
        if (a is None) != (b is None):
            raise ValueError(f"{function}: lora_a[{i}] and lora_b[{i}]: one is None, expected both or neither")
        if a is not None:
            if not isinstance(a, torch.Tensor) or a.dim() != 2 or a.shape[1] != w.shape[1] or a.shape[0] == 0:
                got = tuple(a.shape) if isinstance(a, torch.Tensor) else type(a).__name__
                raise ValueError(f"{function}: lora_a[{i}] is {got}, expected (rank, in={w.shape[1]})")
            want = (w.shape[0], a.shape[0])
            check_like(function, f"lora_b[{i}]", b, want, f"(out={want[0]}, rank={want[1]})", x)
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"{function}: dropout is {dropout!r}, expected a number in [0, 1)")
    check_seed(function, seed, dropout, x)


def lora_weight(weight, a, b, *, scale=1.0, backend="auto"):
    """Semantics: W + scale * B A, the linear and its update as one weight: for few rows, or a weight used otherwise
    than by a linear.

    weight [out, in]; a [rank, in]; b [out, rank]. backend: that of `linear`, which computes the products.
    Gradients: of a and b, and of weight (which gets the incoming one as it is). Floor: its 2 out in rank multiply-adds.
    """
    f = "lora_weight"
    for name, t in (("weight", weight), ("a", a), ("b", b)):
        check_input(f, name, t)
        if t.dim() != 2:
            raise ValueError(f"{f}: {name} has shape {tuple(t.shape)}, expected two dimensions")
    for name, t, want in (("a", a, (a.shape[0], weight.shape[1])), ("b", b, (weight.shape[0], a.shape[0]))):
        check_like(f, name, t, want, f"{want} to match weight and a", weight, "weight")
    scale = number(f, "scale", scale)
    if through_dispatcher(weight) or not needs_grad(weight, a, b):
        return torch.addmm(weight, b, a, alpha=scale)
    return _Merged.apply(weight, a, b, scale, backend)


class _Merged(torch.autograd.Function):
    """The products by the frozen linear's backends: torch's own are half as fast on some CPUs."""

    @staticmethod
    def forward(ctx, weight, a, b, scale, backend):
        ctx.save_for_backward(a, b)
        ctx.config = scale, backend
        return torch.add(weight, linear(b, (a.t().contiguous(),), backend=backend), alpha=scale)

    @staticmethod
    @first_order("lora_weight")
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        scale, backend = ctx.config
        da = db = None
        if ctx.needs_input_grad[1]:  # B^T grad
            da = run_backward(backend, b.t().contiguous(), None, None, [grad], NONE, None).mul_(scale)
        if ctx.needs_input_grad[2]:
            db = linear(rows(grad), (a.detach(),), backend=backend).mul_(scale)
        return grad if ctx.needs_input_grad[0] else None, da, db, None, None


class merge_lora:
    """Semantics: weight += scale * B A in place; `undo()` gives the weight its old bits back (they are kept: an
    addition does not come undone in floating point). Also a context manager.

    weight [out, in], a [rank, in], b [out, rank]; the product in fp32 or wider, rounded once. A merged weight carries
    no gradient to A and B: for inference.
    """

    def __init__(self, weight, a, b, scale=1.0):
        for name, t in (("weight", weight), ("a", a), ("b", b)):
            if not isinstance(t, torch.Tensor) or t.dim() != 2:
                got = tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
                raise ValueError(f"merge_lora: {name} is {got}, expected a tensor of two dimensions")
        for name, t, want in (("a", a, (a.shape[0], weight.shape[1])), ("b", b, (weight.shape[0], a.shape[0]))):
            check_like("merge_lora", name, t, want, f"{want} to match weight and a", weight, "weight")
        self.weight, self._before = weight, weight.detach().clone()
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            weight.copy_(weight.to(wide) + scale * (b.to(wide) @ a.to(wide)))
        self._version = weight._version

    def undo(self) -> None:
        """Semantics: the weight as it was; RuntimeError if it was undone or written to before."""
        if self._before is None:
            raise RuntimeError("merge_lora: undo was called before, expected one call for one merge")
        if self.weight._version != self._version:
            raise RuntimeError("merge_lora: weight was written to since the merge, expected the merged weight")
        with torch.no_grad():
            self.weight.copy_(self._before)
        self._before = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.undo()
