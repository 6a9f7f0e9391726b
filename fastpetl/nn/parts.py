"""What the fused modules of several families share: linears side by side with their pack caches, and key masks."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpetl._autocast import autocast_dtype
from fastpetl._by_torch import by_torch, norm_by_torch
from fastpetl.backends import for_op
from fastpetl.nn.adapted import CHILD, AdaptedLinear
from fastpetl.nn.inline import HOOKS, call_reason, note_fallback, weight_and_bias
from fastpetl.nn.lora import FusedLoRALinear, beside_others, merged_weights


class Fused:
    """Mixin of a fused class, before the original: its state, and the ops its forward is made of."""

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None
    _any_linear = False  # is the original known to ask nothing of its linears' tensors, but for their products?

    def _declines(self, structure, x: torch.Tensor) -> bool:
        """Semantics: must this call take the original forward? Notes why."""
        reason = call_reason(self, structure, x, self._any_linear and by_torch("linear", self._fastpetl_backend, x))
        if reason is not None:
            note_fallback(self, reason)
        return reason is not None

    def _linear(
        self,
        x,
        *linears: nn.Linear,
        slot: str,
        behind: nn.Linear | None = None,
        activation: str = "gelu",
        adapt=True,
        beside=False,
    ) -> torch.Tensor:
        """Semantics: [linear_1(x), linear_2(x), ...] side by side; or, behind another, linear(activation(behind(x))).
        slot: the name of the cache for the packed weights; in inference only, where memory is at its lowest. Linears
        with LoRA are taken merged where they can be (beside: who calls knows that they can), else called; an adapted
        linear's output is adapted, unless adapt is False.
        """
        if len(linears) == 1 and self._by_torch("linear", x):
            return torch_linear(x if behind is None else torch_activated(x, behind, activation), linears[0], adapt)
        from fastpetl import ops

        if len(linears) > 1 and not beside:
            if not all(type(linear) is nn.Linear or beside_others((linear,), x) for linear in linears):
                return torch.cat([self._one(x, linear, f"{slot}{i}") for i, linear in enumerate(linears)], -1)
        weights = merged_weights(linears, x)
        biases = None if linears[0].bias is None else tuple(linear.bias for linear in linears)
        backend = self._op("linear")
        if behind is None:
            y = ops.linear(x, weights, biases, cache=self._pack(slot), backend=backend)
        else:
            first = merged_weights((behind,), x)[0]
            caches, bias = (self._pack(f"before {slot}"), self._pack(slot)), None if biases is None else biases[0]
            options = {"activation": activation, "backend": backend, "caches": caches}
            y = ops.feed_forward(x, first, behind.bias, *weights, bias, **options)
        return linears[0].adapted(y) if adapt and type(linears[0]) is AdaptedLinear else y

    def _each(self, x, *linears: nn.Linear, slot: str, beside=False) -> tuple | list:
        """Semantics: [linear_1(x), linear_2(x), ...], of one size; side by side where a kernel of ours serves."""
        if self._by_torch("linear", x):
            return torch_linears(x, linears)
        return self._linear(x, *linears, slot=slot, beside=beside).chunk(len(linears), -1)

    def _own(self, x, linears, slot: str, heads: int, mask, scaling: float, fused: bool, beside=False) -> tuple:
        """Semantics: self-attention's output and None, or None and q, k, v where `_attend` is not to serve (fused is
        False), or cannot.
        """
        if self._by_torch("linear", x):
            return None, torch_linears(x, linears)
        qkv = self._linear(x, *linears, slot=slot, beside=beside)
        out = self._attend(qkv, heads, mask, scaling) if fused else None
        return out, (qkv.chunk(3, -1) if out is None else None)

    def _one(self, x, linear, slot: str) -> torch.Tensor:
        """One of several linears that cannot be taken side by side, or a query that may have LoRA."""
        plain = type(linear) is nn.Linear or beside_others((linear,), x)
        return self._linear(x, linear, slot=slot) if plain else linear(x)

    def _op(self, name: str) -> str:
        return for_op(name, self._fastpetl_backend)

    def _by_torch(self, op: str, x: torch.Tensor) -> bool:
        return by_torch(op, self._fastpetl_backend, x)

    def _pack(self, slot: str):
        state = self.__dict__
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            if not torch.compiler.is_compiling():
                state.pop("_fastpetl_packs", None)
            return None
        from fastpetl.ops import PackCache

        return state.setdefault("_fastpetl_packs", {}).setdefault(slot, PackCache())

    def _attend(self, qkv: torch.Tensor, heads: int, mask, scaling: float) -> torch.Tensor | None:
        """Semantics: self-attention on q | k | v in one op, nothing dropped, not causal; None where the mask does not
        depend on the key alone, or the configuration asks for other attention than SDPA (eager's maps, say).
        """
        if self.config._attn_implementation != "sdpa":
            return None
        plain, additive = key_mask(mask, *qkv.shape[:2])
        if not plain:
            return None
        from fastpetl import ops

        out = ops.attention(qkv, heads, key_mask=additive, scale=float(scaling), backend=self._op("attention"))
        if mask is not None and mask.dtype == torch.bool:
            lost = additive.amax(-1) < 0  # a sample of padding alone: SDPA gives zeros where a bool mask leaves no key
            out = out.masked_fill(lost[:, None, None], 0) if bool(lost.any()) else out
        return out

    def _few_queries(self, q, source, key: nn.Linear, value: nn.Linear, mask, *, heads, scaling, dropout, **kwargs):
        """Semantics: cross-attention of a few queries, with keys and values never made; None where that would not save
        work, or the configuration, a gradient or the device asks for them. CPU and fp32 only: not measured elsewhere.
        """
        if not q.is_cpu or q.dtype != torch.float32 or torch.compiler.is_compiling() or kwargs.get("output_attentions"):
            return None
        kinds = nn.Linear, FusedLoRALinear
        if self.config._attn_implementation != "sdpa" or type(key) is not nn.Linear or type(value) not in kinds:
            return None
        if mask is None and q.shape[1] > 1 and getattr(self, "is_causal", True):  # as SDPA's caller would take it
            return None
        from fastpetl import ops
        from fastpetl.ops._common import needs_grad

        sizes = q.shape[1], source.shape[1], source.shape[2], heads
        if not ops.cross_attention_saves(*sizes) or needs_grad(mask, key.weight, value.weight):
            return None
        if type(value) is FusedLoRALinear:
            weight = value.in_weight(source)
        else:  # beside a query with LoRA nobody has looked at its hooks
            weight = None if any(value.__dict__[hooks] for hooks in HOOKS) else value.weight
        if weight is None:
            return None
        options = {"heads": heads, "b_k": key.bias, "mask": mask, "scale": float(scaling), "dropout": dropout}
        return ops.cross_attention(q, source, key.weight, weight, value.bias, **options)

    def _output(self, h, dense: nn.Linear, dropout: nn.Dropout, x, norm: nn.LayerNorm, keep: str, **options):
        """Semantics: norm(x + drop(dense(h))), with the adapter of an adapted linear; options as for `_linear`.
        keep: see `ops.adapter_residual_norm`; the first of two sites keeps its norm's output, from which the second has
        its sum.
        """
        dropping = dropout.training and dropout.p > 0
        if type(dense) is not AdaptedLinear or dropping:
            f = drop(self._linear(h, dense, **options), dropout.p, dropout.training)
            return self._add_norm(x, f, norm)
        from fastpetl.nn.adapter_controller import controller_site

        f = self._linear(h, dense, adapt=False, **options)
        adapter, task = dense._modules[CHILD], dense._fastpetl_current
        y = controller_site(adapter, x, f, task, norm, self._op("adapter"), keep)
        return self._add_norm(x, dense.adapted(f), norm) if y is None else y

    def _add_norm(self, x: torch.Tensor, f: torch.Tensor, norm: nn.LayerNorm, own: bool = True) -> torch.Tensor:
        """Semantics: norm(x + f); own: nobody else has seen f, it may be written to."""
        if norm_by_torch(self._fastpetl_backend, x):
            return torch_norm(torch_sum(x, f, own), norm)
        from fastpetl import ops

        options = {"emit": "norm", "backend": self._op("residual_norm"), "overwrite": own}
        return ops.residual_norm(x, f, norm.weight, norm.bias, eps=norm.eps, **options)


def torch_linear(x: torch.Tensor, linear: nn.Linear, adapt: bool = True) -> torch.Tensor:
    """Semantics: what calling `linear` on x gives, by torch's own product; LoRA merged where it can be; adapt: as for
    `Fused._linear`.
    """
    kind = type(linear)
    if kind is FusedLoRALinear and linear.merges(x):
        return product(x, linear.merged(x), linear.bias)
    if kind is not nn.Linear and (adapt or kind is not AdaptedLinear):
        return linear(x)
    return product(x, *weight_and_bias(linear))


def product(x: torch.Tensor, weight, bias) -> torch.Tensor:
    """Semantics: F.linear; under autocast what it casts of frozen weights is kept."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        from fastpetl.ops._casts import cast

        x, weight, bias = cast(x, dtype), cast(weight, dtype), cast(bias, dtype)
    return F.linear(x, weight, bias)


def torch_linears(x: torch.Tensor, linears) -> list:
    """Semantics: `torch_linear` of each; x is cast once."""
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    return [torch_linear(x, linear) for linear in linears]


def torch_sum(x: torch.Tensor, f: torch.Tensor, own: bool) -> torch.Tensor:
    """Semantics: x + f; own: nobody else has seen f, it may be written to where no gradient is recorded."""
    return f.add_(x) if own and f.dtype is x.dtype and not torch.is_grad_enabled() else x + f


def torch_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Semantics: what calling `norm` on x gives."""
    return torch.layer_norm(x, norm.normalized_shape, *weight_and_bias(norm), norm.eps)


def torch_activated(x: torch.Tensor, linear: nn.Linear, activation: str) -> torch.Tensor:
    """Semantics: activation(linear(x)) by torch; in inference where the product is."""
    h = torch_linear(x, linear)
    if activation == "relu":
        return F.relu(h, inplace=not torch.is_grad_enabled())
    return F.gelu(h) if torch.is_grad_enabled() else torch.ops.aten.gelu_(h)


def exact_gelu(activation) -> bool:
    """Semantics: is it x * Phi(x) by erf? That one is fused into the linear behind it, any other is called."""
    if type(activation) is GELUActivation:
        return activation.act is F.gelu
    return activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none")


def inlined(activation) -> str | None:
    """Semantics: the activation's name for `ops.feed_forward`; None: it is to be called."""
    return "gelu" if exact_gelu(activation) else "relu" if is_relu(activation) else None


def drop(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Semantics: F.dropout; torch's own draws, so that a seed means what it means unpatched."""
    if not training or p == 0:
        return x
    from fastpetl import ops

    return ops.dropout(x, p)


def activate(h: torch.Tensor, activation, p: float, training: bool, backend: str = "auto") -> torch.Tensor:
    """Semantics: drop(activation(h)); a ReLU and what is dropped keep one bit an element for the backward."""
    from fastpetl import ops

    p = p if training else 0.0
    if is_relu(activation):
        return ops.relu_dropout(h, p, backend=for_op("dropout", backend))
    return drop(activation(h), p, True)


def is_relu(activation) -> bool:
    """Semantics: is it torch's ReLU, with nobody listening?"""
    if activation is F.relu or activation is torch.relu:
        return True
    state = activation.__dict__ if type(activation) is nn.ReLU else None
    return state is not None and "forward" not in state and not any(state[hooks] for hooks in HOOKS)


def key_mask(mask: torch.Tensor | None, batch: int, keys: int) -> tuple[bool, torch.Tensor | None]:
    """Semantics: (does the mask [B or 1, 1, Q or 1, K] depend on the key alone, as additive fp32 [B, K]).

    Bool masks keep where True. Compared by value, on the CPU only: elsewhere that would wait for the device, and under
    torch.compile it would break the graph.
    """
    if mask is None:
        return True, None
    if torch.compiler.is_compiling() or mask.device.type != "cpu" or mask.dim() != 4 or mask.shape[1] != 1:
        return False, None
    row = mask[:, :, :1]
    if mask.shape[2] > 1 and mask.stride(2) != 0 and not bool((mask == row).all()):
        return False, None
    row = row[:, 0, 0]
    if row.dtype == torch.bool:
        row = torch.zeros(row.shape).masked_fill_(~row, torch.finfo(torch.float32).min)
    return True, row.float().expand(batch, keys)


def heads(t: torch.Tensor, size: int) -> torch.Tensor:
    """Semantics: [B, T, H * size] as [B, H, T, size]."""
    return t.unflatten(-1, (-1, size)).transpose(1, 2)


def attend(q, k, v, mask, dropout: float, scale: float | None = None) -> torch.Tensor:
    """Semantics: softmax(scale * q k^T + mask) v, [B, T, H * d]; q, k, v [B, H, T or S, d]; scale: None for
    1 / sqrt(d). Dropout draws as the probabilities' own would, which SDPA does not promise. Nor is its gradient right
    where an additive mask hides all keys.
    """
    if dropout == 0 and not (torch.is_grad_enabled() and _hides_all(mask)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores if mask is None else scores + mask
    return (drop(scores.softmax(-1), dropout, True) @ v).transpose(1, 2).flatten(2)


def _hides_all(mask) -> bool:
    if mask is None or torch.compiler.is_compiling():
        return False
    from fastpetl.ops._attention import unreachable

    return unreachable(mask)


def interface(module, default):
    """Semantics: the attention function that the module's configuration names."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, default)


# Of what a call may be given, that which transformers' SDPA heeds; the rest it passes over.
_HEEDED = frozenset(("softcap", "output_attentions", "cache", "is_causal", "position_bias"))


def attended(module, default, q, k, v, mask, *, dropout, scaling, **kwargs) -> tuple:
    """Semantics: (output [B, T, H, d], maps or None) of the attention function that the module's configuration names;
    transformers' own SDPA is not called but done, which takes less time, where it has nothing to see to.
    """
    call, causal = interface(module, default), False
    usual = call is sdpa_attention_forward and (q.is_cuda or q.is_cpu) and not torch.compiler.is_compiling()
    usual = usual and _HEEDED.isdisjoint(kwargs) and "num_key_value_groups" not in module.__dict__
    if usual and mask is None:
        causal = q.shape[2] > 1 and getattr(module, "is_causal", True)
        usual = not causal or k.shape[2] <= q.shape[2]
    if not usual:
        return call(module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def cached_keys(module, past, key_value_states, make):
    """Semantics: (keys, values) of this call, make()'s own joined to what the cache holds, and kept there.

    past: None, a Cache, or an EncoderDecoderCache, whose cross-attention part is filled once and then only read.
    """
    from transformers.cache_utils import EncoderDecoderCache

    if past is None:
        return make()
    cross, index = key_value_states is not None, module.layer_idx
    both = isinstance(past, EncoderDecoderCache)
    if not both:
        return past.update(*make(), index)
    if not cross:
        return past.self_attention_cache.update(*make(), index)
    if past.is_updated.get(index):
        layer = past.cross_attention_cache.layers[index]
        return layer.keys, layer.values
    found = past.cross_attention_cache.update(*make(), index)
    past.is_updated[index] = True
    return found
