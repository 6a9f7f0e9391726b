"""OpenAI's own CLIP block, which METER and CLIP-ViL copied, fused: what `fastpetl.patch` puts before the copied class.

Sources: openai/CLIP (2021), zdou0830/METER, ylsung/VL_adapter. A mixin: the class it joins is found by its children and
proven by numbers (patching/_probe.py).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpetl.nn.inline import Inlined, note_fallback, structure
from fastpetl.nn.parts import Fused, attend, exact_gelu
from fastpetl.nn.turns import Calls

_ATTENTION = Inlined(nn.MultiheadAttention, structure(out_proj=NonDynamicallyQuantizableLinear))
_MLP = Inlined(nn.Sequential, structure(c_fc=nn.Linear, c_proj=nn.Linear), called=("gelu",))
STRUCTURE = structure(attn=_ATTENTION, mlp=_MLP)


def attention_reason(attn: nn.MultiheadAttention) -> str | None:
    """Semantics: why the attention, as it stands now, is not one product for q, k and v of all tokens, or None."""
    if attn.in_proj_weight is None or attn.in_proj_bias is None or attn.bias_k is not None or attn.add_zero_attn:
        return "attn has other projections than one for q, k and v with a bias"
    if attn.training and attn.dropout > 0:
        return f"attn drops {attn.dropout} while training"
    return None


class CopiedCLIPBlock(Fused):
    """Semantics: x = x + attn(ln_1(x)); x + mlp(ln_2(x)); x [tokens, batch, width], or with a batch_first attention
    [batch, tokens, width]. The block's own attn_mask is added; a call that brings a mask runs as it was.
    """

    def forward(self, x, *masks, **named):
        reason = attention_reason(self.attn)
        if any(value is not None for value in (*masks, *named.values())):
            reason = "a mask is given"
        if reason is not None:
            note_fallback(self, reason)
        if reason is not None or self._declines(STRUCTURE, x):
            return super().forward(x, *masks, **named)
        x = x + self._attention(self.ln_1(x))
        mlp, act = self.mlp, self.mlp.gelu
        if exact_gelu(act):
            return x + self._linear(self.ln_2(x), mlp.c_proj, slot="fc2", behind=mlp.c_fc)
        h = self._linear(self.ln_2(x), mlp.c_fc, slot="fc1")
        return x + self._linear(act(h), mlp.c_proj, slot="fc2")

    def _attention(self, x):
        from fastpetl import ops

        attn, backend, mask = self.attn, self._op("linear"), self.__dict__.get("attn_mask")
        qkv = ops.linear(x, (attn.in_proj_weight,), (attn.in_proj_bias,), backend=backend, cache=self._pack("qkv"))
        qkv = qkv if attn.batch_first else qkv.transpose(0, 1)
        if mask is None:
            out = ops.attention(qkv, attn.num_heads, backend=self._op("attention"))
        else:
            q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
            out = attend(q, k, v, mask.to(device=x.device, dtype=x.dtype), 0.0)
        out = out if attn.batch_first else out.transpose(0, 1)
        return self._linear(out, attn.out_proj, slot="out")


def block_reason(block: nn.Module) -> str | None:
    """Semantics: why the block's own mask cannot be added, or None."""
    mask = block.__dict__.get("attn_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.is_floating_point()):
        return "attn_mask is no floating-point tensor, expected one that is added"
    return None


class BlockCalls(Calls):
    """Of CLIP's blocks, which `fastpetl.skip` leaves out: a mask says which keys are hidden."""

    mask = "x_mask"

    def __init__(self, form: int, batch_first: bool):
        super().__init__(form)
        self.batch_dim = 0 if batch_first else 1

    def padding(self, args, kwargs):
        mask = super().padding(args, kwargs)
        return mask if mask is None else ~mask.bool()
