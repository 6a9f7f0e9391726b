"""BERT's modules in transformers and their copies (RoBERTa's, BridgeTower's), fused.

Attention is one module (q|k|v and k|v side by side), what follows it another (dense, then dropout + residual + layer
norm in one pass), the feed-forward with its norm a method of the layer.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert as hf

from fastpetl.nn.activations import recognised
from fastpetl.nn.adapted import LORA_LINEAR, OUTPUT_LINEAR
from fastpetl.nn.inline import Inlined, structure
from fastpetl.nn.parts import Fused, attended, cached_keys, exact_gelu, heads
from fastpetl.nn.task_layers import fused_routed

PROJECTIONS = structure(query=LORA_LINEAR, key=nn.Linear, value=LORA_LINEAR)
INTERMEDIATE = structure(dense=nn.Linear)
OUTPUT = structure(dense=OUTPUT_LINEAR, LayerNorm=nn.LayerNorm, dropout=nn.Dropout)


class SelfAttention(Fused):
    """Mixin of a fused BertSelfAttention, before the original."""

    _any_linear = True

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        x, past, size = hidden_states, past_key_values, self.attention_head_size
        if self._declines(PROJECTIONS, x):
            return super().forward(x, attention_mask, past, **kwargs)
        p = self.dropout.p if self.training else 0.0
        # SDPA takes the module for causal where there is no mask; eager attention never does.
        causal = kwargs.get("is_causal", self.is_causal) and attention_mask is None
        linears, fused = (self.query, self.key, self.value), past is None and not causal and p == 0
        out, qkv = self._own(x, linears, "qkv", self.num_attention_heads, attention_mask, self.scaling, fused)
        if out is not None:
            return out, None
        q, k, v = (heads(t, size) for t in qkv)
        if past is not None:
            k, v = cached_keys(self, past, None, lambda: (k, v))
        options = {"dropout": p, "scaling": self.scaling, **kwargs}
        out, weights = attended(self, hf.eager_attention_forward, q, k, v, attention_mask, **options)
        return out.flatten(2), weights


class CrossAttention(Fused):
    """Mixin of a fused BertCrossAttention, before the original."""

    _any_linear = True

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, past_key_values=None, **kwargs):
        x, source, size = hidden_states, encoder_hidden_states, self.attention_head_size
        if self._declines(PROJECTIONS, x):
            return super().forward(x, source, attention_mask, past_key_values, **kwargs)

        def keys():
            both = self._each(source, self.key, self.value, slot="kv")
            return [heads(t, size) for t in both]

        q = heads(self._one(x, self.query, "q"), size)
        k, v = cached_keys(self, past_key_values, source, keys)
        p = self.dropout.p if self.training else 0.0
        options = {"dropout": p, "scaling": self.scaling, **kwargs}
        out, weights = attended(self, hf.eager_attention_forward, q, k, v, attention_mask, **options)
        return out.flatten(2), weights


class Output(Fused):
    """Semantics: LN(drop(dense(h)) + x). Mixin of a fused BertSelfOutput, before the original."""

    _any_linear = True

    def forward(self, hidden_states, input_tensor):
        if self._declines(OUTPUT, hidden_states):
            return super().forward(hidden_states, input_tensor)
        keep = "sum" if self._forward_hooks else "norm"  # a hook might write to what is kept
        return self._output(hidden_states, self.dense, self.dropout, input_tensor, self.LayerNorm, keep, slot="dense")


class Intermediate(Fused):
    """Semantics: act(dense(x)); an exact GELU or a ReLU is computed where the product's results are. Any other
    activation is called, and a module that somebody listens to. Mixin of a fused BertIntermediate that is called by
    itself, before the original.
    """

    def forward(self, hidden_states):
        x, act, dense = hidden_states, self.intermediate_act_fn, self.dense
        if self._declines(INTERMEDIATE, x):
            return super().forward(x)
        from fastpetl.ops._common import through_dispatcher

        name = None if through_dispatcher(x) else recognised(act)
        if name is None:
            return act(self._linear(x, dense, slot="dense"))
        from fastpetl import ops

        options = {"activation": name, "backend": self._op("linear"), "cache": self._pack("dense")}
        return ops.activated_linear(x, dense.weight, dense.bias, **options)


class FeedForward(Fused):
    """Semantics: LN(drop(dense2(gelu(dense1(x)))) + x). Mixin of a fused BertLayer, before the original."""

    _any_linear = True

    structures: tuple[dict[str, Inlined], dict[str, Inlined]]  # activation called, activation inlined

    @classmethod
    def structure_of(cls, layer) -> dict[str, Inlined]:
        """What this class reads of `layer` past its children's forward."""
        return cls.structures[exact_gelu(getattr(layer._modules.get("intermediate"), "intermediate_act_fn", None))]

    def feed_forward_chunk(self, attention_output):
        y = self._chunk(attention_output)
        return super().feed_forward_chunk(attention_output) if y is None else y

    def _chunk(self, x):
        """None where this call must take the original's way."""
        if self._declines(self.structure_of(self), x):
            return None
        inner, outer = self.intermediate, self.output
        h, options = x, {"slot": "fc2", "behind": inner.dense}
        if not exact_gelu(inner.intermediate_act_fn):
            h, options = inner.intermediate_act_fn(self._linear(x, inner.dense, slot="fc1")), {"slot": "fc2"}
        return self._output(h, outer.dense, outer.dropout, x, outer.LayerNorm, "inputs", **options)


def feed_forward(intermediate: type, output: type) -> tuple:
    """Semantics: `FeedForward.structures` of a layer with these children."""
    outer = Inlined(output, OUTPUT)
    called = Inlined(intermediate, structure(dense=nn.Linear), called=("intermediate_act_fn",))
    inlined = Inlined(intermediate, structure(dense=nn.Linear, intermediate_act_fn=GELUActivation))
    return tuple(structure(intermediate=inner, output=outer) for inner in (called, inlined))


TASK_LAYERS = ("BertLayer", "RobertaLayer")  # those methods with tasks are attached to


def fuse(module: str, library, prefix: str, layers: tuple[str, ...]) -> dict[str, type]:
    """Semantics: the fused classes of a copy of BERT's modules, by name, for the namespace of `module`."""
    named = {
        **{f"{prefix}SelfAttention": SelfAttention, f"{prefix}CrossAttention": CrossAttention},
        **{f"{prefix}SelfOutput": Output, **dict.fromkeys(layers, FeedForward)},
    }
    parts = feed_forward(getattr(library, f"{prefix}Intermediate"), getattr(library, f"{prefix}Output"))
    made = {}
    for name, mixin in named.items():
        doc = f"{name}, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."
        body = {"__module__": module, "__doc__": doc, "__qualname__": f"Fused{name}"}
        if mixin is FeedForward:
            body["structures"] = parts
        # Same names as the originals: accelerate and others match modules by class name; pickle finds __qualname__.
        made[f"Fused{name}"] = type(name, (mixin, getattr(library, name)), body)
        if mixin is FeedForward and name in TASK_LAYERS:
            made[f"FusedTask{name}"] = fused_routed(module, mixin, getattr(library, name), structures=parts)
    return made


globals().update(fuse(__name__, hf, "Bert", ("BertLayer",)))
