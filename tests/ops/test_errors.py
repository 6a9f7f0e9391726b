"""Bad input: every message names the function, the argument, what it got and what was expected."""

import re

import pytest
import torch

from fastpetl import ops

D, R = 40, 8
X = torch.zeros(3, D)
NAMES = ("w_down", "b_down", "w_up", "b_up")
PARAMETERS = dict(w_down=torch.zeros(R, D), b_down=torch.zeros(R), w_up=torch.zeros(D, R), b_up=torch.zeros(D))


def adapter(x=X, **changed):
    given = {**PARAMETERS, **changed}
    return ops.adapter(x, *(given.pop(k) for k in NAMES), **given)


def linear(x=X, weights=PARAMETERS["w_down"], biases=PARAMETERS["b_down"], **options):
    return ops.linear(x, weights, biases, **options)


def attention(qkv=torch.zeros(2, 5, 96), heads=4, **options):  # noqa: B008  (a constant)
    return ops.attention(qkv, heads, **options)


Z = torch.zeros
BAD = [
    (adapter, dict(x=[1.0]), TypeError, "adapter: x is a list, expected a torch.Tensor"),
    (
        adapter,
        dict(x=Z(3, D, dtype=torch.int64)),
        ValueError,
        "adapter: x has dtype int64, expected a floating-point dtype",
    ),
    (adapter, dict(x=Z(())), ValueError, "adapter: x has shape (), expected at least one dimension"),
    (adapter, dict(w_down=None), TypeError, "adapter: w_down is a NoneType, expected a torch.Tensor"),
    (
        adapter,
        dict(w_down=Z(R, 41)),
        ValueError,
        "adapter: w_down has shape (8, 41), expected (bottleneck, hidden=40) to match x",
    ),
    (
        adapter,
        dict(w_down=Z(0, D)),
        ValueError,
        "adapter: w_down has shape (0, 40), expected (bottleneck, hidden=40) to match x",
    ),
    (
        adapter,
        dict(w_up=Z(D, 7)),
        ValueError,
        "adapter: w_up has shape (40, 7), expected (hidden=40, bottleneck=8) to match w_down",
    ),
    (
        adapter,
        dict(w_up=Z(R, D)),
        ValueError,
        "adapter: w_up has shape (8, 40), expected (hidden=40, bottleneck=8) to match w_down",
    ),
    (
        adapter,
        dict(b_down=Z(D)),
        ValueError,
        "adapter: b_down has shape (40,), expected (bottleneck=8,) to match w_down",
    ),
    (adapter, dict(b_up=Z(R)), ValueError, "adapter: b_up has shape (8,), expected (hidden=40,) to match x"),
    (
        adapter,
        dict(norm_weight=Z(1)),
        ValueError,
        "adapter: norm_weight has shape (1,), expected (hidden=40,) to match x",
    ),
    (
        adapter,
        dict(norm_weight=Z(D), norm_bias=Z(1)),
        ValueError,
        "adapter: norm_bias has shape (1,), expected (hidden=40,)",
    ),
    (adapter, dict(norm_bias=Z(D)), ValueError, "adapter: norm_bias is given without norm_weight"),
    (
        adapter,
        dict(w_up=Z(D, R).bfloat16()),
        ValueError,
        "adapter: w_up has dtype bfloat16, expected float32 to match x (mixed",
    ),
    (adapter, dict(b_up=Z(D, device="meta")), ValueError, "adapter: b_up is on meta, expected cpu to match x"),
    (
        adapter,
        dict(activation="tanh"),
        ValueError,
        "adapter: activation is 'tanh', expected one of identity, relu, gelu,",
    ),
    (adapter, dict(activation=1), ValueError, "adapter: activation is 1, expected one of identity, relu"),
    (adapter, dict(scale=torch.ones(())), TypeError, "adapter: scale is a Tensor, expected a Python number"),
    (adapter, dict(eps=None), TypeError, "adapter: eps is a NoneType, expected a Python number"),
    (adapter, dict(residuals=X), TypeError, "adapter: residuals is a Tensor, expected a tuple of tensors"),
    (adapter, dict(residuals=(1,)), TypeError, "adapter: residuals[0] is a int, expected a torch.Tensor"),
    (
        adapter,
        dict(residuals=(X, Z(1, D))),
        ValueError,
        "adapter: residuals[1] has shape (1, 40), expected (3, 40) to match x",
    ),
    (
        adapter,
        dict(residuals=(X.double(),)),
        ValueError,
        "adapter: residuals[0] has dtype float64, expected float32 to match x",
    ),
    (
        adapter,
        dict(residuals=(X, X, X, X)),
        ValueError,
        "adapter: residuals has 3 tensors beside x, expected at most 2",
    ),
    (linear, dict(x=None), TypeError, "linear: x is a NoneType, expected a torch.Tensor"),
    (linear, dict(weights=3), TypeError, "linear: weights is a int, expected a tensor or a sequence of tensors"),
    (linear, dict(weights=()), ValueError, "linear: weights is empty, expected at least one tensor"),
    (
        linear,
        dict(weights=(Z(R, D), 1)),
        ValueError,
        "linear: biases has 1 tensors, expected 2 to match weights, or None",
    ),
    (linear, dict(weights=(1,)), TypeError, "linear: weights[0] is a int, expected a torch.Tensor"),
    (
        linear,
        dict(weights=Z(R, 7)),
        ValueError,
        "linear: weights[0] has shape (8, 7), expected (out_features, in_features=40)",
    ),
    (
        linear,
        dict(weights=Z(R, D).half()),
        ValueError,
        "linear: weights[0] has dtype float16, expected float32 to match x",
    ),
    (linear, dict(biases=Z(9)), ValueError, "linear: biases[0] has shape (9,), expected (8,) to match weights[0]"),
    (linear, dict(norm=Z(D)), TypeError, "linear: norm is not a triple, expected None or (weight, bias or None, eps)"),
    (linear, dict(norm=(Z(D), None, "a")), TypeError, "linear: eps is a str, expected a Python number"),
    (
        linear,
        dict(norm=(Z(R), None, 1e-5)),
        ValueError,
        "linear: norm weight has shape (8,), expected (40,) to match x",
    ),
    (linear, dict(activation="relu"), ValueError, "linear: activation is 'relu', expected None or 'gelu'"),
    (
        linear,
        dict(activation="gelu", norm=(Z(D), None, 1e-5)),
        ValueError,
        "linear: norm and activation are both given",
    ),
    (linear, dict(cache={}), TypeError, "linear: cache is a dict, expected a fastpetl.ops.PackCache"),
    (
        attention,
        dict(qkv=Z(2, 96)),
        ValueError,
        "attention: qkv has shape (2, 96), expected (batch, tokens, 3 * 4 heads * head size)",
    ),
    (
        attention,
        dict(heads=5),
        ValueError,
        "attention: qkv has shape (2, 5, 96), expected (batch, tokens, 3 * 5 heads * head size)",
    ),
    (attention, dict(heads=0), ValueError, "attention: heads is 0, expected an integer of at least 1"),
    (attention, dict(scale=Z(())), TypeError, "attention: scale is a Tensor, expected a Python number"),
    (attention, dict(key_mask=[0]), TypeError, "attention: key_mask is a list, expected a torch.Tensor"),
    (
        attention,
        dict(key_mask=Z(2, 1, 1, 5)),
        ValueError,
        "attention: key_mask has shape (2, 1, 1, 5), expected (2, 5) to match qkv",
    ),
    (
        attention,
        dict(key_mask=Z(2, 5).bool()),
        ValueError,
        "attention: key_mask has dtype bool, expected an additive floating",
    ),
    (
        attention,
        dict(key_mask=Z(2, 5, device="meta")),
        ValueError,
        "attention: key_mask is on meta, expected cpu to match qkv",
    ),
]


@pytest.mark.parametrize("function, changed, kind, message", BAD, ids=[f"{f.__name__}-{m[:40]}" for f, _, _, m in BAD])
def test_bad_input(function, changed, kind, message):
    with pytest.raises(kind, match="^" + re.escape(message)):
        function(**changed)


def test_the_good_calls_are_good():
    assert adapter().shape == (3, D) and linear().shape == (3, R) and attention().shape == (2, 5, 32)
