"""VL-BART (VL-T5, ICML 2021; VL-Adapter, CVPR 2022): BART whose encoder reads text and visual features jointly.

Hugging Face's BART, its decoder, layers and generation included, with another embedding stage in the encoder.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart import modeling_bart as hf
from transformers.models.bart.configuration_bart import BartConfig
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


class VLBartConfig(BartConfig):
    """BartConfig of the paper's size (bart-base and 200 more words) with the visual embedding's: feat_dim channels per
    feature, pooled to n_boxes features per image, at most n_images images.
    """

    model_type = "vlbart"

    vocab_size: int = 50465
    encoder_layers: int | None = 6
    decoder_layers: int | None = 6
    encoder_ffn_dim: int | None = 3072
    decoder_ffn_dim: int | None = 3072
    encoder_attention_heads: int | None = 12
    decoder_attention_heads: int | None = 12
    d_model: int | None = 768
    attention_dropout: float | int | None = 0.1
    activation_dropout: float | int | None = 0.1
    feat_dim: int = 2048
    pos_dim: int = 4
    n_boxes: int = 36
    n_images: int = 2
    downsample: bool = True


class VLBartEncoder(hf.BartEncoder):
    """Semantics: BartEncoder over [text; visual]: LN(words + positions), then the visual embedding as it is, dropout.

    attention_mask [B, T] is about the text (all ones if not given); visual tokens are always seen.
    """

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config, nn.LayerNorm)
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
            raise ValueError("VLBartEncoder: expected exactly one of input_ids and inputs_embeds")
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = text + self.embed_positions(text[:, :, -1])
        x, prompts = prompted(self, x, kwargs.get("task"))
        x = self.layernorm_embedding(x)
        if vis_feats is not None:
            x = torch.cat([x, self.visual_embedding(vis_feats, vis_boxes, img_order_ids, obj_order_ids)], 1)
        x = F.dropout(x, self.dropout, self.training)
        mask = joint_mask(attention_mask, x.shape[1], prompts)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=mask)
        for layer in self.layers:
            if not (self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop):
                x = layer(x, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=x)


_OBJECTS = "encoder.visual_embedding.obj_order_embedding.weight"


class VLBartModel(hf.BartModel):
    """BartModel with a VLBartEncoder; the object order embedding is the word embedding."""

    config_class = VLBartConfig
    _tied_weights_keys = {**hf.BartModel._tied_weights_keys, _OBJECTS: "shared.weight"}

    def __init__(self, config: VLBartConfig):
        hf.BartPreTrainedModel.__init__(self, config)
        scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.shared = hf.BartScaledWordEmbedding(config.vocab_size, config.d_model, config.pad_token_id, scale)
        self.encoder = VLBartEncoder(config)
        self.decoder = hf.BartDecoder(config)
        self.post_init()

    def set_input_embeddings(self, value):
        super().set_input_embeddings(value)
        words = self.encoder.visual_embedding.obj_order_embedding
        words.weight, words.num_embeddings = value.weight, value.num_embeddings

    def forward(self, input_ids=None, attention_mask=None, encoder_outputs=None, inputs_embeds=None, **kwargs):
        visual = {name: kwargs.pop(name, None) for name in VISUAL}
        attention_mask = text_mask(attention_mask, input_ids, self.config.pad_token_id)
        if encoder_outputs is None:
            wanted = {k: v for k, v in kwargs.items() if not k.startswith("decoder_")}
            wanted = {k: v for k, v in wanted.items() if k not in ("past_key_values", "use_cache", "return_dict")}
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **visual, **wanted)
        mask = joint_mask(attention_mask, encoder_outputs[0].shape[1], prompt_length(self.encoder))
        return super().forward(input_ids, mask, encoder_outputs=encoder_outputs, inputs_embeds=inputs_embeds, **kwargs)


class VLBart(hf.BartForConditionalGeneration):
    """Semantics: logits of the answer given text and image: model(input_ids=, vis_feats=, labels=) -> Seq2SeqLMOutput.

    input_ids [B, T], attention_mask [B, T] (default: not padding), vis_feats [B, N, feat_dim] or
    [B, images, N, feat_dim], vis_boxes [B, (images,) N, 4] (default: zeros), img_order_ids, obj_order_ids: see
    `VisualEmbedding`. labels [B, L], -100 ignored; scores [B] weigh the samples' losses; reduction: see
    `sequence_loss`. task: which task's adapters run (`fastpetl.task` sets it for all calls).
    `generate(input_ids, vis_feats=..., ...)` is GenerationMixin's, with cache and beams.
    """

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig):
        hf.BartPreTrainedModel.__init__(self, config)
        self.model = VLBartModel(config)
        self.final_logits_bias = nn.Buffer(torch.zeros(1, config.vocab_size))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        labels=None,
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
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if task is not None:
            kwargs["task"] = task
        visual = (vis_feats, vis_boxes, img_order_ids, obj_order_ids)
        kwargs.update(zip(VISUAL, visual, strict=True))
        out = super().forward(input_ids, attention_mask, decoder_input_ids, **kwargs)
        if labels is not None:
            out.loss = sequence_loss(out.logits, labels, scores, reduction)
        return out

    @classmethod
    def from_original(cls, source, config: VLBartConfig | None = None) -> VLBart:
        """Semantics: the model of a checkpoint of the originals (a path or a state_dict), adapters attached if it has
        them; in eval mode. config: needed where heads are not 64 wide or dropout is not the paper's.
        """
        return load_original(cls, source, config, _sizes)


def _sizes(state) -> dict:
    vocab_size, d = state["model.shared.weight"].shape
    encoder, decoder = "model.encoder.layers", "model.decoder.layers"
    visual = "model.encoder.visual_embedding"
    return {
        "vocab_size": vocab_size,
        "d_model": d,
        "encoder_layers": count_layers(state, encoder),
        "decoder_layers": count_layers(state, decoder),
        "encoder_attention_heads": max(1, d // 64),
        "decoder_attention_heads": max(1, d // 64),
        "encoder_ffn_dim": state[f"{encoder}.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": state[f"{decoder}.0.fc1.weight"].shape[0],
        "max_position_embeddings": state["model.encoder.embed_positions.weight"].shape[0] - 2,
        "feat_dim": state[f"{visual}.feat_embedding.0.weight"].shape[1],
        "n_images": state[f"{visual}.img_order_embedding.weight"].shape[0],
    }
