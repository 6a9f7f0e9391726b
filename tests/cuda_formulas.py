"""The site in plain torch, for the tests of the CUDA kernels on the CPU: operands, results, the two-times rule."""

import torch
import torch.nn.functional as F

import cuda_kernels as ck

ACTIVATIONS = [lambda z: z, F.relu, F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu]
EPS = dict(eps=1e-3, tail_eps=1e-4)
NO_NORM, NO_RES = ("norm_weight", "norm_bias"), ("res1", "res2")


def operands(rows, d, r, dtype, drop=(), offset=0.0):
    """Random operands with a canary row of NaN after each, so that reading past the end poisons the result."""
    shapes = {"x": (rows, d), "w_down": (r, d), "b_down": (r,), "w_up": (d, r), "b_up": (d,), "norm_weight": (d,)}
    shapes |= {"norm_bias": (d,), "res1": (rows, d), "res2": (rows, d), "tail_weight": (d,), "tail_bias": (d,)}
    made = {}
    for name, shape in shapes.items():
        if name in drop:
            continue
        size = {"w_down": d**-0.5, "w_up": r**-0.5}.get(name, 1.0)
        buffer = torch.full((shape[0] + 1, *shape[1:]), float("nan")).to(dtype)
        made[name] = buffer[:-1].copy_(torch.randn(shape) * size + offset * (name == "x"))
    return made


def reference(t, activation=1, add_x=True, tail=0, eps=1e-5, tail_eps=1e-6, scale=1.0, dtype=torch.float64):
    t = {name: v.to(dtype) for name, v in t.items()}
    x = u = t["x"]
    if "norm_weight" in t:
        u = F.layer_norm(x, x.shape[-1:], t["norm_weight"], t.get("norm_bias"), eps)
    z = F.linear(u, t["w_down"], t.get("b_down"))
    s = scale * F.linear(ACTIVATIONS[activation](z), t["w_up"], t.get("b_up"))
    s = s + (x if add_x else 0) + t.get("res1", 0) + t.get("res2", 0)
    out = {"s": s, "z": z}
    if tail == 1:
        out["n"] = F.layer_norm(s, s.shape[-1:], t["tail_weight"], t.get("tail_bias"), tail_eps)
    elif tail == 2:
        out["n"] = F.rms_norm(s, s.shape[-1:], t["tail_weight"], tail_eps)
    return out


def check(ours, exact, torchs):
    """The project's rule: at most twice the error of torch at that dtype."""
    assert not ours.isnan().any()
    floor = 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + floor


def check_stats(got, x, eps, rms=False):
    x = x.double()
    mean = torch.zeros(len(x)).double() if rms else x.mean(1)
    expected = torch.stack([mean, ((x - mean[:, None]).square().mean(1) + eps).rsqrt()], 1)
    torch.testing.assert_close(got.double(), expected, atol=4e-6, rtol=1e-5)


def check_forward(kernels, rows, d, r, dtype, drop, tail, warps_m):
    """The forward on random operands, all that it gives."""
    t = operands(rows, d, r, dtype, drop)
    options = dict(activation=2, scale=0.7, tail=tail, **EPS)
    got = ck.site_forward(kernels, t, warps_m=warps_m, **options)
    exact, torchs = reference(t, **options), reference(t, **options, dtype=dtype)
    for name in exact:
        check(got[name], exact[name], torchs[name])
    if "norm_weight" in t:
        check_stats(got["stats"], t["x"], 1e-3)
    if tail:
        check_stats(got["tail_stats"], got["s"], 1e-4, tail == 2)
