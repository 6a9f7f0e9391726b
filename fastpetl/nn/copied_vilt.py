"""ViLT's own code, fused: what `fastpetl.patch` puts before a copied `vision_transformer.Block` and DAS's adapter.

Sources: dandelin/ViLT (ICML 2021), DoubtedSteam/DAS (NeurIPS 2023). Their classes live in every project that copied
them, so these are mixins: the class they join is found by its children and proven by numbers (patching/_probe.py).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.adapter import fused_adapter
from fastpetl.nn.inline import Inlined, call_reason, note_fallback, structure
from fastpetl.nn.turns import Calls

_NORM = "adapter_layer_norm_before"
ADAPTER_CHILDREN = ("down_proj", "non_linear_func", "up_proj")
BLOCK_CHILDREN = ("norm1", "attn", "drop_path", "norm2", "mlp")


def is_adapter(module: nn.Module) -> bool:
    """Semantics: has the children of the original's Adapter_Layer (ViLT) and ParallelAdapter (METER)."""
    return module._modules.keys() - {_NORM} == {*ADAPTER_CHILDREN}


def is_block(module: nn.Module) -> bool:
    """Semantics: has the children of the original's Block, with DAS's two adapters or without."""
    adapters = module._modules.keys() - {*BLOCK_CHILDREN}
    return len(module._modules) == 5 + len(adapters) and adapters in (set(), {"adapter0", "adapter1"})


def adapter_structure(adapter: nn.Module) -> dict[str, Inlined]:
    norm = {_NORM: nn.LayerNorm} if _NORM in adapter._modules else {}
    return structure(down_proj=nn.Linear, non_linear_func=nn.ReLU, up_proj=nn.Linear, **norm)


def adapter_reason(adapter: nn.Module) -> str | None:
    """Semantics: why the adapter, as its attributes stand now, is not A(x) = scale * up(relu(down(LN(x)))), or None."""
    option = adapter.__dict__.get("adapter_layernorm_option")
    if (option == "in") != (_NORM in adapter._modules):
        return f"adapter_layernorm_option is {option!r}, expected 'in' with a norm, or another without one"
    if not isinstance(adapter.__dict__.get("scale"), float):
        return "scale is learnt, expected a number"
    if adapter.training and getattr(adapter, "dropout", 0.0) > 0:
        return f"dropout {adapter.dropout} inside the adapter while training"
    return None


class CopiedAdapter:
    """`Adapter_Layer` / `ParallelAdapter` in one op, same numbers. Made by `fastpetl.patch`, never constructed."""

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def forward(self, x, add_residual=True, residual=None):
        reason = adapter_reason(self) or call_reason(self, adapter_structure(self), x)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, add_residual=add_residual, residual=residual)
        residuals = () if not add_residual else (x if residual is None else residual,)
        from fastpetl.backends import for_op

        return fused_adapter(self, x, residuals, for_op("adapter", self._fastpetl_backend), "relu")


def block_structure(block: nn.Module) -> dict[str, Inlined]:
    """What a fused block reads past its children's forward: all but the activation, if it is not the exact GELU, and
    stochastic depth.
    """
    inlined_gelu = _exact_gelu(block.mlp._modules.get("act"))
    act = {"act": nn.GELU} if inlined_gelu else {}
    children = {
        "norm1": nn.LayerNorm,
        "attn": Inlined(
            type(block.attn), structure(qkv=nn.Linear, attn_drop=nn.Dropout, proj=nn.Linear, proj_drop=nn.Dropout)
        ),
        "norm2": nn.LayerNorm,
        "mlp": Inlined(
            type(block.mlp), structure(fc1=nn.Linear, fc2=nn.Linear, drop=nn.Dropout, **act), called=("act",)
        ),
    }
    for name in ("adapter0", "adapter1"):
        if name in block._modules:
            children[name] = Inlined(type(block._modules[name]), adapter_structure(block._modules[name]))
    return structure(**children)


class CopiedBlock:
    """`vision_transformer.Block`, plain or with DAS adapters: same numbers, fewer kernels. Made by `fastpetl.patch`.

    Semantics: x = x + drop_path(attn(norm1(x))) (+ adapter0(x)); x = x + drop_path(mlp(norm2(x))) (+ adapter1(x));
    returns (x, None): the attention map, which nothing in ViLT reads, is never made.
    """

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def forward(self, x, mask=None):
        reason = call_reason(self, block_structure(self), x) or _adapters_reason(self)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, mask=mask)
        f = self._attention(x, mask)
        x = self._site("adapter0", x, self.drop_path(f))
        return self._site("adapter1", x, self.drop_path(self._mlp(x))), None

    def _linear(self, x, linear, **kwargs):
        from fastpetl import ops
        from fastpetl.backends import for_op

        bias = None if linear.bias is None else (linear.bias,)
        return ops.linear(x, (linear.weight,), bias, backend=for_op("linear", self._fastpetl_backend), **kwargs)

    def _attention(self, x, mask):
        attn = self.attn
        qkv = self._linear(x, attn.qkv, norm=_norm(self.norm1))
        if attn.attn_drop.training and attn.attn_drop.p > 0:
            h = _dropped_attention(attn, qkv, mask)
        else:
            from fastpetl import ops
            from fastpetl.backends import for_op

            additive = None if mask is None else torch.zeros(mask.shape, device=qkv.device)
            additive = None if mask is None else additive.masked_fill_(~mask.bool(), float("-inf"))
            backend = for_op("attention", self._fastpetl_backend)
            h = ops.attention(qkv, attn.num_heads, key_mask=additive, scale=float(attn.scale), backend=backend)
        return _drop(self._linear(h, attn.proj), attn.proj_drop)

    def _mlp(self, x):
        mlp = self.mlp
        if _exact_gelu(mlp.act) and not (mlp.drop.training and mlp.drop.p > 0):
            from fastpetl import ops
            from fastpetl.backends import for_op

            options = {"norm": _norm(self.norm2), "backend": for_op("linear", self._fastpetl_backend)}
            return ops.feed_forward(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, **options)
        h = self._linear(x, mlp.fc1, norm=_norm(self.norm2))
        return _drop(self._linear(_drop(mlp.act(h), mlp.drop), mlp.fc2), mlp.drop)

    def _site(self, name, x, f):
        from fastpetl.backends import for_op

        adapter = self._modules.get(name)
        if adapter is None:
            return x + f
        return fused_adapter(adapter, x, (x, f), for_op("adapter", self._fastpetl_backend), "relu")


class BlockCalls(Calls):
    """Of ViLT's blocks, which `fastpetl.skip` leaves out."""

    mask = "mask"


def _adapters_reason(block) -> str | None:
    adapters = (block._modules.get(name) for name in ("adapter0", "adapter1"))
    return next((reason for a in adapters if a is not None and (reason := adapter_reason(a)) is not None), None)


def _exact_gelu(activation) -> bool:
    return type(activation) is nn.GELU and activation.approximate == "none"


def _norm(norm: nn.LayerNorm) -> tuple:
    return norm.weight, norm.bias, norm.eps


def _drop(x, dropout: nn.Dropout):
    return F.dropout(x, dropout.p) if dropout.training and dropout.p > 0 else x


def _dropped_attention(attn, qkv, mask):
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) * attn.scale
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))
    return (_drop(scores.softmax(-1), attn.attn_drop) @ v).transpose(1, 2).reshape(batch, tokens, width // 3)
