"""A language model's output projection, frozen with the word embedding it is tied to: as large as all of a decoder."""

from __future__ import annotations

from torch import nn

from fastpetl._by_torch import by_torch
from fastpetl.backends import for_op
from fastpetl.nn.inline import call_reason, note_fallback, read_dtype, tensor_reason
from fastpetl.nn.parts import product


class FusedHead(nn.Linear):
    """nn.Linear on this machine's fastest GEMM where its weights want no gradient, else torch's own. Made by
    `fastpetl.patch`, never constructed.
    """

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def forward(self, x):
        if by_torch("linear", self._fastpetl_backend, x):
            return product(x, self.weight, self.bias)
        from fastpetl.ops._common import needs_grad

        weight, bias = self.weight, self.bias
        if needs_grad(weight, bias):
            return super().forward(x)  # `ops.linear` is about dx alone
        reason = call_reason(self, {}, x) or self._tensors_reason(x)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x)
        from fastpetl import ops

        biases = None if bias is None else (bias,)
        return ops.linear(x, (weight,), biases, backend=for_op("linear", self._fastpetl_backend))

    def _tensors_reason(self, x) -> str | None:
        for name in ("weight", "bias"):
            reason = tensor_reason(getattr(self, name), read_dtype(x), x.device)
            if reason is not None:
                return f"{name} {reason}"
        return None


FusedHead.__name__ = "Linear"  # as the original's: accelerate and others match modules by class name
