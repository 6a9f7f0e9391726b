"""Shared by the op tests: backends with a reason when they cannot run here, random arguments, the rule of tolerance."""

import contextlib
import os

import pytest
import torch

from fastpetl import backends
from fastpetl._build import extension

DEVICE = os.environ.get("FASTPETL_TEST_DEVICE", "cpu")  # conftest.py makes it the default device


def _cpu_isas():
    module, _ = extension()
    return [f"cpp-{isa}" for isa in module.cpu_isas()] if module else ["cpp"]


needs_cpp = pytest.mark.skipif(extension()[0] is None, reason=extension()[1])
ADAPTER_BACKENDS = ["reference", *_cpu_isas(), "triton", "cuda"]
SITE_LAUNCHERS = ["reference", "composed", *_cpu_isas(), "triton", "cuda"]
LINEAR_BACKENDS = ["reference", "torch", "onednn", *_cpu_isas()]
ATTENTION_BACKENDS = ["reference", "torch", *_cpu_isas()]


@contextlib.contextmanager
def using(op, label, dtype=torch.float32):
    """Yields the backend's name, the instruction set of `label` in use; skips, saying why, where it cannot serve."""
    name, _, isa = label.partition("-")
    ok, reason = backends.verify(op, name, DEVICE, dtype)
    if not ok:
        pytest.skip(reason)
    if not isa:
        yield name
        return
    module, _ = extension()
    before = module.cpu_isa()
    module.set_cpu_isa(isa)
    try:
        yield name
    finally:
        module.set_cpu_isa(before)


def assert_two_times(ours, theirs, want, what):
    """|ours - fp64| <= 2 |torch at that dtype - fp64| + eps |fp64|, in the Frobenius norm.

    eps: half a unit of the dtype, and two of fp32 for the order of summation (torch sums pairwise).
    """
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == want.shape, what
    assert torch.isfinite(ours).all(), f"{what} is not finite"
    error, allowed = (ours.double() - want).norm(), (theirs.double() - want).norm()
    eps = torch.finfo(ours.dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
    allowed = 2 * allowed + eps * want.norm()
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e} (norm {want.norm():.2e})"


NAMES = ("x", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "res1", "res2")


def adapter_arguments(rows, d, r, dtype=torch.float32, norm=True, bias=True, norm_bias=True, residuals=2):
    """Tensors by name, leaves that want gradients, absent ones None; magnitudes as in a trained network."""

    def draw(*shape, scale=1.0, offset=0.0):
        return (offset + scale * torch.randn(*shape)).to(dtype).requires_grad_()

    return dict(
        x=draw(rows, d, scale=1.5, offset=0.3),
        w_down=draw(r, d, scale=d**-0.5),
        b_down=draw(r, scale=0.1) if bias else None,
        w_up=draw(d, r, scale=r**-0.5),
        b_up=draw(d, scale=0.1) if bias else None,
        norm_weight=draw(d, scale=0.2, offset=1.0) if norm else None,
        norm_bias=draw(d, scale=0.2) if norm and norm_bias else None,
        res1=draw(rows, d) if residuals > 0 else None,
        res2=draw(rows, d) if residuals > 1 else None,
    )


def like(arguments, dtype):
    """The same values as new leaves of another dtype."""
    return {
        k: None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for k, t in arguments.items()
    }


def call_adapter(function, a, add_x=True, **options):
    residuals = tuple(t for t in (a["x"] if add_x else None, a["res1"], a["res2"]) if t is not None)
    parameters = (a["w_down"], a["b_down"], a["w_up"], a["b_up"])
    norm = dict(norm_weight=a["norm_weight"], norm_bias=a["norm_bias"])
    return function(a["x"], *parameters, **norm, residuals=residuals, **options)


def gradients(y, arguments, cotangent):
    """Gradients by name of every argument that wants one."""
    wanted = {k: t for k, t in arguments.items() if t is not None and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), cotangent.to(y.dtype)), strict=True))
