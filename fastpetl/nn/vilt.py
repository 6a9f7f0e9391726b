"""Hugging Face's ViLT, fused: the classes `fastpetl.patch` swaps in for ViltLayer, with and without DAS adapters, and
ViltEncoder.

One block is [LN | qkv] -> attention -> proj -> site -> [LN | fc1] -> [gelu | fc2] -> site, every step one op of
`fastpetl.ops`. What a call asks for that the ops do not do takes the original forward or, where only the attention is
concerned, attention in torch.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import GELUActivation
from transformers.models.vilt import modeling_vilt

from fastpetl._by_torch import by_torch
from fastpetl.backends import for_op
from fastpetl.nn.adapted import LORA_LINEAR, OUTPUT_LINEAR, AdaptedLinear
from fastpetl.nn.adapter import INLINED_ADAPTER, fused_adapter, fused_site
from fastpetl.nn.inline import Inlined, call_reason, note_fallback, structure
from fastpetl.nn.lora import beside_others, merged_weights
from fastpetl.nn.parts import attend, drop, heads, torch_activated, torch_linear, torch_linears, torch_norm
from fastpetl.nn.task_layers import fused_routed
from fastpetl.nn.vilt_das import DASViltLayer, SkipViltEncoder


def _layer_structure(inline_activation: bool, **adapters: Inlined) -> dict[str, Inlined]:
    dense_dropout = structure(dense=OUTPUT_LINEAR, dropout=nn.Dropout)
    qkv = structure(query=LORA_LINEAR, key=nn.Linear, value=LORA_LINEAR, dropout=nn.Dropout)
    mlp = structure(dense=nn.Linear, **({"intermediate_act_fn": GELUActivation} if inline_activation else {}))
    return structure(
        attention=Inlined(
            modeling_vilt.ViltAttention,
            structure(
                attention=Inlined(modeling_vilt.ViltSelfAttention, qkv),
                output=Inlined(modeling_vilt.ViltSelfOutput, dense_dropout),
            ),
        ),
        intermediate=Inlined(modeling_vilt.ViltIntermediate, mlp, called=("intermediate_act_fn",)),
        output=Inlined(modeling_vilt.ViltOutput, dense_dropout),
        layernorm_before=nn.LayerNorm,
        layernorm_after=nn.LayerNorm,
        **adapters,
    )


_ADAPTERS = {"adapter0": INLINED_ADAPTER, "adapter1": INLINED_ADAPTER}


def exact_gelu(activation) -> bool:
    """Semantics: is it ViLT's default activation, x * Phi(x) by erf? That one is inlined, any other is called."""
    return type(activation) is GELUActivation and activation.act is F.gelu


class _FusedBlock:
    """What the fused layers share: a mixin before the original class, whose forward is the way back."""

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None
    _fastpetl_structures: tuple[dict[str, Inlined], dict[str, Inlined]]  # activation called, activation inlined

    @classmethod
    def structure_of(cls, layer) -> dict[str, Inlined]:
        """What this class reads of `layer` past its children's forward."""
        activation = getattr(layer._modules.get("intermediate"), "intermediate_act_fn", None)
        return cls._fastpetl_structures[exact_gelu(activation)]

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        if output_attentions:
            reason = "output_attentions=True: the original forward makes the maps"
        else:
            plain = by_torch("linear", self._fastpetl_backend, hidden_states)
            reason = call_reason(self, self.structure_of(self), hidden_states, plain)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(hidden_states, attention_mask, output_attentions)
        return ((self._block_by_torch if plain else self._block)(hidden_states, attention_mask),)

    def _block_by_torch(self, x, attention_mask):
        """`_block` where torch's own linears serve, as on a GPU: they are called at once."""
        attention, proj, out, inner = self.attention.attention, self.attention.output, self.output, self.intermediate
        n = torch_norm(x, self.layernorm_before)
        qkv = torch_linears(n, (attention.query, attention.key, attention.value))
        h = _attend_apart(attention, qkv, attention_mask)
        f = _drop(torch_linear(h, proj.dense), proj.dropout)
        if self._norm_in_site(x, for_op("linear", self._fastpetl_backend)):
            x, n = self._normed_site(x, f, self.layernorm_after)
        else:
            x = self._site(0, x, f)
            n = torch_norm(x, self.layernorm_after)
        if exact_gelu(inner.intermediate_act_fn):
            h = torch_activated(n, inner.dense, "gelu")
        else:
            h = inner.intermediate_act_fn(torch_linear(n, inner.dense))
        return self._site(1, x, _drop(torch_linear(h, out.dense), out.dropout))

    def _packs(self) -> tuple:
        """A cache per linear for its weights in the GEMM's layout: inference only, where memory is at its lowest."""
        state = self.__dict__
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            if not torch.compiler.is_compiling():
                state.pop("_fastpetl_packs", None)
            return (None,) * 4
        if "_fastpetl_packs" not in state:
            from fastpetl.ops import PackCache

            state["_fastpetl_packs"] = tuple(PackCache() for _ in range(4))
        return state["_fastpetl_packs"]

    def _block(self, x, attention_mask):
        from fastpetl import ops

        linear = for_op("linear", self._fastpetl_backend)
        packs = self._packs()
        attention, proj, out = self.attention.attention, self.attention.output, self.output
        qkv = (attention.query, attention.key, attention.value)
        if all(type(one) is nn.Linear or beside_others((one,), x) for one in qkv):
            norm = _norm(self.layernorm_before)
            h = ops.linear(x, *_side_by_side(x, *qkv), norm=norm, backend=linear, cache=packs[0])
        else:  # with LoRA in training, or in a batch of several tasks
            n = self.layernorm_before(x)
            h = torch.cat([one(n) for one in qkv], -1)
        h = _attend(attention, h, attention_mask, for_op("attention", self._fastpetl_backend))
        h = ops.linear(h, *_side_by_side(x, proj.dense), backend=linear, cache=packs[1])
        f = _drop(_adapted(proj.dense, h), proj.dropout)
        if self._norm_in_site(x, linear):
            x, h = self._normed_site(x, f, self.layernorm_after)
            h = self._feed_forward(h, None, linear, packs[2:])
        else:
            x = self._site(0, x, f)
            h = self._feed_forward(x, _norm(self.layernorm_after), linear, packs[2:])
        return self._site(1, x, _drop(_adapted(out.dense, h), out.dropout))

    def _feed_forward(self, x, norm, backend: str, packs: tuple) -> torch.Tensor:
        from fastpetl import ops

        inner, out = self.intermediate, self.output
        (w1,), b1 = _side_by_side(x, inner.dense)
        if exact_gelu(inner.intermediate_act_fn):
            (w2,), b2 = _side_by_side(x, out.dense)
            biases = (None if b is None else b[0] for b in (b1, b2))
            return ops.feed_forward(x, w1, next(biases), w2, next(biases), norm=norm, backend=backend, caches=packs)
        h = inner.intermediate_act_fn(ops.linear(x, w1, b1, norm=norm, backend=backend, cache=packs[0]))
        return ops.linear(h, *_side_by_side(h, out.dense), backend=backend, cache=packs[1])

    def _norm_in_site(self, x, linear: str) -> bool:
        """Is the norm behind the first site cheaper there than in the linear that reads it?"""
        return False


class _PlainBlock(_FusedBlock):
    _fastpetl_structures = (_layer_structure(False), _layer_structure(True))

    def _site(self, index, x, f):
        return f + x


class FusedViltLayer(_PlainBlock, modeling_vilt.ViltLayer):
    """ViltLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


FusedTaskViltLayer = fused_routed(__name__, _PlainBlock, modeling_vilt.ViltLayer)


class FusedDASViltLayer(_FusedBlock, DASViltLayer):
    """ViltLayer with DAS adapters, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    _fastpetl_structures = (_layer_structure(False, **_ADAPTERS), _layer_structure(True, **_ADAPTERS))

    def _site(self, index, x, f):
        adapter = self.adapter1 if index else self.adapter0
        return fused_adapter(adapter, x, (x, f), for_op("adapter", self._fastpetl_backend))

    def _norm_in_site(self, x, linear: str) -> bool:
        from fastpetl import backends

        backend = backends.for_op("adapter", self._fastpetl_backend)
        device, dtype = x.device.type, x.dtype
        if x.is_cpu and dtype == torch.float32 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return backends.if_served("site", backend, device, dtype) == "cpp"  # its backward adds both gradients of x
        if backends.if_served_constant("site", backend, device, dtype) in (None, "composed"):
            return False
        # torch's linear would norm in a kernel of its own
        return backends.resolve_constant("linear", linear, device, dtype).name == "torch"

    def _normed_site(self, x, f, norm):
        return fused_site(self.adapter0, x, f, norm, "both", for_op("adapter", self._fastpetl_backend))


class FusedViltPatchEmbeddings(modeling_vilt.ViltPatchEmbeddings):
    """ViltPatchEmbeddings, same numbers: patches do not overlap, so the frozen convolution is one linear per patch and
    takes the fastest GEMM. On the CPU; cuDNN's convolution is left alone. Made by `fastpetl.patch`, never constructed.
    """

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None
    structure = structure(projection=nn.Conv2d)

    def forward(self, pixel_values):
        conv = self.projection
        reason = call_reason(self, self.structure, pixel_values)
        if reason is None and (pixel_values.device.type != "cpu" or pixel_values.dim() != 4):
            reason = "not a batch of images on the CPU"
        if reason is None and pixel_values.shape[1] == self.num_channels and not _trains(conv):
            return self._patches(pixel_values, conv)
        if reason is not None:
            note_fallback(self, reason)
        return super().forward(pixel_values)

    def _patches(self, x, conv):
        """Semantics: the convolution's [B, d, H / p, W / q], as a view of [B, H / p, W / q, d]."""
        from fastpetl import ops

        p, q = conv.kernel_size
        batch, channels, height, width = x.shape
        h, w = height // p, width // q
        x = x[:, :, : h * p, : w * q].reshape(batch, channels, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
        weights, biases = (conv.weight.flatten(1),), None if conv.bias is None else (conv.bias,)
        backend = for_op("linear", self._fastpetl_backend)
        return ops.linear(x.reshape(batch, h, w, -1), weights, biases, backend=backend).permute(0, 3, 1, 2)


def _trains(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


class _SharedMask:
    """Tells the layers when a mask depends on the key alone, as ViltModel's always does.

    Semantics: the same values; a [batch, 1, T, T] mask whose rows are equal is passed on as a view of its first row.
    """

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        return super().forward(hidden_states, _share_rows(attention_mask), *args, **kwargs)


class FusedViltEncoder(_SharedMask, modeling_vilt.ViltEncoder):
    """ViltEncoder, patched. Made by `fastpetl.patch`, never constructed."""


class FusedSkipViltEncoder(_SharedMask, SkipViltEncoder):
    """SkipViltEncoder, patched. Made by `fastpetl.patch`, never constructed."""


def _side_by_side(x, *linears: nn.Linear) -> tuple[tuple, tuple | None]:
    weights = merged_weights(linears, x)
    return weights, None if linears[0].bias is None else tuple(linear.bias for linear in linears)


def _adapted(linear: nn.Linear, f: torch.Tensor) -> torch.Tensor:
    return linear.adapted(f) if type(linear) is AdaptedLinear else f


def _norm(norm: nn.LayerNorm) -> tuple:
    return norm.weight, norm.bias, norm.eps


def _drop(x: torch.Tensor, dropout: nn.Dropout) -> torch.Tensor:
    return drop(x, dropout.p, dropout.training)


def _share_rows(mask: torch.Tensor | None) -> torch.Tensor | None:
    # Under torch.compile the comparison would break the graph: the layers then attend in torch.
    if mask is None or mask.dim() != 4 or _key_only(mask) or torch.compiler.is_compiling():
        return mask
    row = mask[:, :, :1]
    return row.expand_as(mask) if bool((mask == row).all()) else mask


def _key_only(mask: torch.Tensor) -> bool:
    return mask.dim() == 4 and mask.size(1) == 1 and (mask.size(2) == 1 or mask.stride(2) == 0)


def _attend(attention, qkv: torch.Tensor, mask: torch.Tensor | None, backend: str) -> torch.Tensor:
    """Semantics: softmax(q k^T / sqrt(d) + mask) v per head; the op if the mask depends on the key alone and nothing
    is dropped.
    """
    heads, size, dropout = attention.num_attention_heads, attention.attention_head_size, attention.dropout
    batch, tokens, _ = qkv.shape
    dropped = dropout.training and dropout.p > 0
    if not dropped and (mask is None or (_key_only(mask) and mask.is_floating_point())):
        from fastpetl import ops

        key_mask = None if mask is None else mask[:, 0, 0].float().expand(batch, tokens)
        return ops.attention(qkv, heads, key_mask=key_mask, scale=1.0 / math.sqrt(size), backend=backend)
    q, k, v = qkv.view(batch, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / math.sqrt(size)
    if mask is not None:
        scores = scores + mask
    return (_drop(scores.softmax(-1), dropout) @ v).transpose(1, 2).reshape(batch, tokens, heads * size)


def _attend_apart(attention, qkv, mask: torch.Tensor | None) -> torch.Tensor:
    """Semantics: as `_attend`, by torch, from the three parts."""
    size, dropout = attention.attention_head_size, attention.dropout
    q, k, v = (heads(t, size) for t in qkv)
    if mask is not None and mask.dtype != q.dtype:  # whatever it is, it is added; no -inf by rounding
        mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
    return attend(q, k, v, mask, dropout.p if dropout.training else 0.0)


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
FusedViltLayer.__name__ = FusedDASViltLayer.__name__ = "ViltLayer"
FusedViltEncoder.__name__ = FusedSkipViltEncoder.__name__ = "ViltEncoder"
FusedViltPatchEmbeddings.__name__ = "ViltPatchEmbeddings"
