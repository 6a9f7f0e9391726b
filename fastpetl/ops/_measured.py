"""Which backend serves an eager call of an op whose backward depends on its forward: measured, both together."""

from __future__ import annotations

import contextlib
import threading

import torch

from .. import backends

_part = threading.local()  # .of: (samples here, samples of the batch) while a part of a batch is computed


@contextlib.contextmanager
def part_of(samples: int, batch: int):
    """Semantics: in here a choice by the number of rows is the one for the whole batch, of which `samples` are
    computed: what a sample gets does not depend on how many others are computed with it.
    """
    before, _part.of = getattr(_part, "of", None), (samples, batch)
    try:
        yield
    finally:
        _part.of = before


def of_the_batch(count: int) -> int:
    """Semantics: a number of rows (or samples), as it were for the whole batch.

    Not where tensors that autograd saves are packed, as in a checkpoint: what is computed again there, in the
    backward, does not know of the batch, and has to choose as its forward did.
    """
    of = getattr(_part, "of", None)
    if of is None or count % of[0] or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return count
    return count // of[0] * of[1]


def choose(op: str, name: str, names, key: tuple, one, tensors, grad: bool, baseline: str, tolerance: float) -> str:
    """Semantics: the fastest of `names` for one(name, tensors), once per process and `key`; `name` where there is
    nothing to choose or torch.func is at work.

    tensors: the call's arguments, None among them; `one` returns a tensor or a tuple with None in it. Where a gradient
    is wanted, forward and backward are measured together: what a backend keeps decides what its backward costs. The
    measurement is none of the caller's business: its saved-tensor hooks (a checkpoint's, say) do not see it.
    """
    if len(names) == 1 or torch._C._are_functorch_transforms_active():
        return name
    key = (f"{op}+backward" if grad else op, *key, torch.get_num_threads())
    found = backends.picked(key)
    if found is not None:
        return found

    def run(name):
        if not grad:
            return _outputs(one(name, tensors))[0]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
            outs = _outputs(one(name, leaves))
            wanted = [t for t in leaves if t is not None and t.requires_grad]
            return torch.autograd.grad(outs, wanted, [_cotangent(y) for y in outs])[0]

    return backends.pick(key, {n: lambda n=n: run(n) for n in names}, baseline, tolerance)


def _cotangent(y):
    """Not y itself: through a norm its gradient is nothing but rounding."""
    return torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device).square().expand_as(y).contiguous()


def _same(t):
    return t


def rows_class(x) -> int:
    """The number of rows of x [..., d], or of the batch that x is a part of, rounded up to a power of two."""
    return 1 << (of_the_batch(x.numel() // max(x.shape[-1], 1)) - 1).bit_length()


def _outputs(out) -> list:
    return [t for t in out if t is not None] if isinstance(out, tuple) else [out]
