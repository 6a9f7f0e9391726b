"""VL-Adapter on Hugging Face's BART layers in plain torch: what an attached, unpatched model runs.

Source: ylsung/VL_adapter, VL-T5/src/my_transformers/modeling_bart.py; names of the new children are theirs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart import modeling_bart as hf
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from fastpetl.nn.adapter_controller import AdapterController
from fastpetl.nn.prompt import prompted, seen_in_front
from fastpetl.nn.tasks import TaskRouted


def _feed_forward(layer, x):
    h = F.dropout(layer.activation_fn(layer.fc1(x)), layer.activation_dropout, layer.training)
    return layer.fc2(h)


def _site(layer, x, f, adapter, task, norm):
    f = f if adapter is None else adapter(f, task)
    return norm(x + F.dropout(f, layer.dropout, layer.training))


class AdapterBartEncoderLayer(TaskRouted, hf.BartEncoderLayer):
    """Semantics: x = LN(x + drop(A(Attn(x)))); y = LN(x + drop(A(FFN(x)))), A an `AdapterController`.

    Has two more children than BartEncoderLayer, `attn_adapter` and `ff_adapter`.
    """

    attn_adapter: AdapterController
    ff_adapter: AdapterController

    def forward(self, hidden_states, attention_mask=None, task=None, **kwargs):
        x = hidden_states
        f, _ = self.self_attn(x, attention_mask=attention_mask, **kwargs)
        x = _site(self, x, f, self.attn_adapter, task, self.self_attn_layer_norm)
        x = _site(self, x, _feed_forward(self, x), self.ff_adapter, task, self.final_layer_norm)
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class AdapterBartDecoderLayer(TaskRouted, hf.BartDecoderLayer):
    """Semantics: as `AdapterBartEncoderLayer`, with an adapter after the cross-attention as well, if there is one.

    Has up to three more children than BartDecoderLayer: `self_attn_adapter`, `enc_attn_adapter` and `ff_adapter`.
    """

    self_attn_adapter: AdapterController
    ff_adapter: AdapterController

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=True,
        task=None,
        **kwargs,
    ):
        x = hidden_states
        f, _ = self.self_attn(x, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
        x = _site(self, x, f, self.self_attn_adapter, task, self.self_attn_layer_norm)
        if encoder_hidden_states is not None:
            f, _ = self.encoder_attn(
                x,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            x = _site(self, x, f, self._modules.get("enc_attn_adapter"), task, self.encoder_attn_layer_norm)
        return _site(self, x, _feed_forward(self, x), self.ff_adapter, task, self.final_layer_norm)


class PromptBartEncoder:
    """Mixin of a BartEncoder (`with_prompts`). Semantics: BartEncoder over [prompts; text]: LN([prompts; words +
    positions]), dropout, layers.

    Has one more child, `prompt_modules`; attention_mask [B, T] is about the text.
    """

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("BartEncoder: expected exactly one of input_ids and inputs_embeds")
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x, _ = prompted(self, text + self.embed_positions(text[:, :, -1]), kwargs.get("task"))
        x = F.dropout(self.layernorm_embedding(x), self.dropout, self.training)
        mask = seen_in_front(attention_mask, x.shape[1])
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=mask)
        for layer in self.layers:
            if not (self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop):
                x = layer(x, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=x)


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
AdapterBartEncoderLayer.__name__ = "BartEncoderLayer"
AdapterBartDecoderLayer.__name__ = "BartDecoderLayer"
