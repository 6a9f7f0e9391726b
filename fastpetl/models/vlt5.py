"""VL-T5 (ICML 2021; VL-Adapter, CVPR 2022): T5 whose encoder reads text and visual features jointly.

Hugging Face's T5, its decoder, blocks and generation included, with another embedding stage and position bias in the
encoder.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.t5 import modeling_t5 as hf
from transformers.models.t5.configuration_t5 import T5Config
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from fastpetl.models._vl import (
    VISUAL,
    VisualEmbedding,
    count_layers,
    joint_mask,
    load_original,
    sequence_loss,
    text_mask,
)
from fastpetl.nn.prompt import prompt_length, prompted


class VLT5Config(T5Config):
    """T5Config of the paper's size (t5-base and 72 more rows of words) with the visual embedding's: feat_dim channels
    per feature, pooled to n_boxes features per image, at most n_images images.
    """

    model_type = "vlt5"

    vocab_size: int = 32200
    d_model: int = 768
    d_ff: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    decoder_start_token_id: int | None = 0
    feat_dim: int = 2048
    pos_dim: int = 4
    n_boxes: int = 36
    n_images: int = 2
    downsample: bool = True


class VLT5Encoder(hf.T5Stack):
    """Semantics: T5Stack over [text; visual]; the relative position bias is about the text, zero wherever a visual
    token is one of the two.

    attention_mask [B, T] is about the text (all ones if not given); visual tokens are always seen.
    """

    config_class = VLT5Config

    def __init__(self, config: VLT5Config):
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config, lambda d: hf.T5LayerNorm(d, eps=config.layer_norm_epsilon))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        vis_feats=None,
        vis_boxes=None,
        img_order_ids=None,
        obj_order_ids=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("VLT5Encoder: expected exactly one of input_ids and inputs_embeds")
        kwargs.pop("use_cache", None)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x, prompts = prompted(self, x, kwargs.get("task"))
        n_text = x.shape[1]
        bias = self.block[0].layer[0].SelfAttention.compute_bias(n_text, n_text, device=x.device)
        if vis_feats is not None:
            vis = self.visual_embedding(vis_feats, vis_boxes, img_order_ids, obj_order_ids)
            x = torch.cat([x, vis], 1)
            bias = F.pad(bias, (0, vis.shape[1], 0, vis.shape[1]))
        mask = joint_mask(attention_mask, x.shape[1], prompts)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=mask)
        x = self.dropout(x)
        for block in self.block:
            x = block(x, mask, bias, **kwargs)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.dropout(self.final_layer_norm(x)))


class VLT5(hf.T5ForConditionalGeneration):
    """Semantics: logits of the answer given text and image: model(input_ids=, vis_feats=, labels=) -> Seq2SeqLMOutput.

    Arguments as `fastpetl.models.VLBart`. `generate(input_ids, vis_feats=..., ...)` is GenerationMixin's, with cache
    and beams.
    """

    config_class = VLT5Config
    _tied_weights_keys = {
        **hf.T5ForConditionalGeneration._tied_weights_keys,
        "encoder.visual_embedding.obj_order_embedding.weight": "shared.weight",
    }

    def __init__(self, config: VLT5Config):
        hf.T5PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = VLT5Encoder(self._stack_config(config, is_decoder=False, use_cache=False))
        self.decoder = hf.T5Stack(self._stack_config(config, is_decoder=True, num_layers=config.num_decoder_layers))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def _stack_config(config, **changes):
        config = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VisualEmbedding):  # the original leaves these as torch makes them
            for linear in (module.feat_embedding[0], module.absolute_vis_pos_embedding[0]):
                bound = 1 / math.sqrt(linear.in_features)
                init.uniform_(linear.weight, -bound, bound)
                init.uniform_(linear.bias, -bound, bound)

    def set_input_embeddings(self, new_embeddings):
        super().set_input_embeddings(new_embeddings)
        words = self.encoder.visual_embedding.obj_order_embedding
        words.weight, words.num_embeddings = new_embeddings.weight, new_embeddings.num_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        labels=None,
        encoder_outputs=None,
        inputs_embeds=None,
        vis_feats=None,
        vis_boxes=None,
        img_order_ids=None,
        obj_order_ids=None,
        scores=None,
        reduction="sample",
        task=None,
        **kwargs,
    ):
        if labels is not None:
            kwargs["use_cache"] = False
            if decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None:
                decoder_input_ids = self._shift_right(labels)
        if task is not None:
            kwargs["task"] = task
        attention_mask = text_mask(attention_mask, input_ids, self.config.pad_token_id)
        if encoder_outputs is None:
            visual = dict(zip(VISUAL, (vis_feats, vis_boxes, img_order_ids, obj_order_ids), strict=True))
            wanted = {k: v for k, v in kwargs.items() if not k.startswith("decoder_")}
            wanted = {k: v for k, v in wanted.items() if k not in ("past_key_values", "use_cache", "return_dict")}
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **visual, **wanted)
        mask = joint_mask(attention_mask, encoder_outputs[0].shape[1], prompt_length(self.encoder))
        out = super().forward(
            attention_mask=mask, decoder_input_ids=decoder_input_ids, encoder_outputs=encoder_outputs, **kwargs
        )
        if labels is not None:
            out.loss = sequence_loss(out.logits, labels, scores, reduction)
        return out

    @classmethod
    def from_original(cls, source, config: VLT5Config | None = None) -> VLT5:
        """Semantics: the model of a checkpoint of the originals (a path or a state_dict), adapters attached if it has
        them; in eval mode. config: needed where heads are not 64 wide or dropout is not the paper's.
        """
        return load_original(cls, source, config, _sizes)


def _sizes(state) -> dict:
    vocab_size, d = state["shared.weight"].shape
    bias = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    visual = "encoder.visual_embedding"
    return {
        "vocab_size": vocab_size,
        "d_model": d,
        "num_layers": count_layers(state, "encoder.block"),
        "num_decoder_layers": count_layers(state, "decoder.block"),
        "num_heads": bias.shape[1],
        "relative_attention_num_buckets": bias.shape[0],
        "d_kv": state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // bias.shape[1],
        "d_ff": state["encoder.block.0.layer.1.DenseReluDense.wi.weight"].shape[0],
        "feat_dim": state[f"{visual}.feat_embedding.0.weight"].shape[1],
        "n_images": state[f"{visual}.img_order_embedding.weight"].shape[0],
    }
