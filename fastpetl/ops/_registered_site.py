"""The registered ops of the site in one launch (see _library.py)."""

from __future__ import annotations

import torch

from ._common import wide
from ._fused import asked, placed
from ._library import apart, autograd, not_twice, register
from ._site import empty, run_backward, run_forward


def _forward(*args):
    *args, save, backend = args
    s, n, *saved = run_forward(backend, *args, save)
    if not save:  # no two of an op's results are the same tensor, which a launcher's without elements may be
        x = args[0]
        saved = x.new_empty(0), *(x.new_empty(0, dtype=wide(x)) for _ in range(2))
    return s, n, *saved


def _forward_fake(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, tail_weight, tail_bias, add_x, eps,
                  code, scale, tail, tail_eps, emit_s, save, backend):  # fmt: skip
    return empty(x, w_down.shape[0], norm_weight, emit_s, save)


def _backward(g_s, g_n, *args):
    g, *rest = run_backward(args[-1], g_s, g_n, *args[:-1])
    return g.clone() if g_n is None else g, *apart(rest)  # an op's result is never its argument


def _backward_fake(g_s, g_n, s, tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, code,
                   scale, tail, needs, backend):  # fmt: skip
    r, d = w_down.shape
    shapes = (x.shape, (r, d), (r,), (d, r), (d,), (d,), (d,), (d,), (d,))
    made = (x.new_empty(shape if needs >> i & 1 else (0,)) for i, shape in enumerate(shapes))
    return x.new_empty(x.shape), *made


def _context(ctx, inputs, output):
    x, w_down, _, w_up, _, norm_weight, norm_bias, _, _, tail_weight, _, *config, save, backend = inputs
    s, _, z, stats, tail_stats = output
    add_x, _, code, scale, tail, _, emit_s = config
    ctx.mark_non_differentiable(z, stats, tail_stats, *(() if emit_s else (s,)))
    ctx.set_materialize_grads(False)
    ctx.config = add_x, code, scale, tail, backend
    ctx.emit_s, ctx.save = emit_s, save
    ctx.save_for_backward(s, tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, norm_bias)


def _gradient(ctx, g_s, g_n, *_):
    if not ctx.save:
        raise RuntimeError("fastpetl::site: save is False but a gradient is wanted, expected save=True")
    g_s = g_s if ctx.emit_s else None
    if g_s is None and g_n is None:
        return (None,) * 20
    add_x, code, scale, tail, backend = ctx.config
    needs = asked(ctx.needs_input_grad)
    out = torch.ops.fastpetl.site_backward(
        g_s, g_n, *ctx.saved_tensors, add_x, code, scale, tail, needs, backend
    )  # fmt: skip
    return (*placed(out, needs, ctx.needs_input_grad), *(None,) * 9)


register(
    "site(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? res1, Tensor? res2, Tensor tail_weight, Tensor? tail_bias, bool add_x, float eps, int activation, "
    "float scale, int tail, float tail_eps, bool emit_s, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "site_backward(Tensor? g_s, Tensor? g_n, Tensor s, Tensor tail_stats, Tensor tail_weight, Tensor x, Tensor z, "
    "Tensor stats, Tensor w_down, Tensor w_up, Tensor? norm_weight, Tensor? norm_bias, bool add_x, int activation, "
    "float scale, int tail, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
autograd("site", _context, _gradient)
not_twice("site_backward")
