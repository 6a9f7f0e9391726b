"""METER (CVPR 2022): a CLIP vision transformer, RoBERTa, and six pairs of layers in which each looks at the other.

Built of Hugging Face's CLIPVisionModel, RobertaModel and BridgeTower's cross layer, which has METER's names and math.
Source: zdou0830/METER, meter/modules/{meter_module,clip_model,bert_model,heads,objectives}.py.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerModelOutput, BridgeTowerPooler
from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel
from transformers.models.roberta import RobertaConfig, RobertaModel

from fastpetl.models._meter import load_original
from fastpetl.nn.meter import MeterCrossLayer


class MeterConfig(PreTrainedConfig):
    """The paper's sizes: RoBERTa-base, CLIP ViT-B/16 at 288 pixels without its last block, 6 + 6 cross-modal layers.

    text_config, vision_config: a RobertaConfig and a CLIPVisionConfig, or dicts of what differs from the above;
    type_vocab_size: rows of the modality embedding, 3 for two images (NLVR2). max_text_length is used for counting
    alone. The other names are BERT's, for the cross-modal layers.
    """

    model_type = "meter"
    sub_configs_defaults = {"text_config": RobertaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    type_vocab_size: int = 2
    max_text_length: int = 50
    is_decoder: bool = False
    add_cross_attention: bool = False
    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        text = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        vision = {"num_hidden_layers": 11, "patch_size": 16, "image_size": 288}
        if self.text_config is None or isinstance(self.text_config, dict):
            self.text_config = RobertaConfig(**{**text, **(self.text_config or {})})
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**{**vision, **(self.vision_config or {})})
        super().__post_init__(**kwargs)


class MeterPreTrainedModel(PreTrainedModel):
    config_class = MeterConfig
    base_model_prefix = "meter"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("MeterCrossLayer", "RobertaLayer", "RobertaEmbeddings", "CLIPEncoderLayer")

    @classmethod
    def from_original(cls, source, config: MeterConfig | None = None):
        """Semantics: the model of a checkpoint of METER's or DAS's code (a path or a state_dict), DAS adapters attached
        if it has them, a head it lacks newly made; in eval mode. config: needed where heads are not 64 wide, dropout is
        not the paper's, or the image size is another: the position embedding is then resized, bicubically.
        """
        return load_original(cls, source, config)


class MeterModel(MeterPreTrainedModel):
    """Semantics: text and image features after the cross-modal layers, and [pooled text, pooled image].

    forward(input_ids [B, T], pixel_values [B, 3, H, W], attention_mask [B, T] or None, image_token_type_idx=1) ->
    text_features [B, T, d], image_features [B, N, d], pooler_output [B, 2d]. Both layers of a pair read what the pair
    before gave. image_token_type_idx: the modality embedding's row for the image, 2 for a second one.
    output_hidden_states: hidden_states are the (text, image) features before the first pair and after each.
    output_attentions (attn_implementation="eager"): attentions are, per pair, (text's, image's), each (own [B, heads,
    Q, Q], of the other stream [B, heads, Q, K]), None for a skipped layer. None: what the configuration says.

    `fastpetl.skip` leaves out cross-modal layers: x = shortcut(x) where skipped, gates 0 .. n-1 the text layers, n ..
    2n-1 the image layers. `fastpetl.attach(model, DASConfig())` adds adapters, `adapter_list_l` and `adapter_list_v`
    (shortcuts of text and image) and `token4classifier`, which stands in for the first text token.
    """

    _fastpetl_skip: tuple = (None, "identity")  # the skip set (None, a bool per block, or a policy), and the shortcut

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.text_transformer = RobertaModel._from_config(config.text_config, add_pooling_layer=False)
        self.vit_model = CLIPVisionModel._from_config(config.vision_config)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, config.hidden_size)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        for name in ("text", "image"):
            layers = [MeterCrossLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)]
            self.add_module(f"cross_modal_{name}_layers", nn.ModuleList(layers))
            self.add_module(f"cross_modal_{name}_pooler", BridgeTowerPooler(config))
        self.post_init()

    def get_input_embeddings(self):
        return self.text_transformer.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_transformer.set_input_embeddings(value)

    def forward(
        self,
        input_ids,
        pixel_values,
        attention_mask=None,
        image_token_type_idx: int = 1,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ):
        if not 0 < image_token_type_idx < self.config.type_vocab_size:
            raise ValueError(
                f"MeterModel: image_token_type_idx is {image_token_type_idx}, expected one of "
                f"1 .. {self.config.type_vocab_size - 1} (type_vocab_size - 1)"
            )
        x = self.text_transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        x = self.cross_modal_text_transform(x)
        token = getattr(self, "token4classifier", None)
        if token is not None:
            x = torch.cat([token.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1:]], 1)
        y = self.vit_model.post_layernorm(self.vit_model(pixel_values).last_hidden_state)
        y = self.cross_modal_image_transform(y)
        types = self.token_type_embeddings.weight
        hidden, maps = self._asked(output_hidden_states, output_attentions)
        mask = _additive(attention_mask, x.dtype)
        x, y = self._fuse(x + types[0], y + types[image_token_type_idx], mask, hidden, maps)
        pooled = torch.cat([self.cross_modal_text_pooler(x), self.cross_modal_image_pooler(y)], -1)
        asked = {name: tuple(t) for name, t in (("hidden_states", hidden), ("attentions", maps)) if t is not None}
        return BridgeTowerModelOutput(text_features=x, image_features=y, pooler_output=pooled, **asked)

    def _asked(self, hidden: bool | None, maps: bool | None) -> tuple[list | None, list | None]:
        """Lists to be filled with what the call asks for."""
        hidden = self.config.output_hidden_states if hidden is None else hidden
        maps = self.config.output_attentions if maps is None else maps
        skip, _ = self._fastpetl_skip
        if maps and self.config._attn_implementation != "eager":
            raise ValueError(
                f"MeterModel: output_attentions is True with attn_implementation "
                f"{self.config._attn_implementation!r}, expected 'eager', which makes the maps"
            )
        if maps and skip is not None and not isinstance(skip, tuple):
            raise ValueError(
                "MeterModel: output_attentions is True while samples skip blocks of their own, expected not"
            )
        return [] if hidden else None, [] if maps else None

    def _fuse(self, x, y, mask, hidden=None, maps=None):
        skip, shortcut = self._fastpetl_skip
        if skip is not None and not isinstance(skip, tuple):
            return self._fuse_per_sample(x, y, mask, skip, shortcut, hidden)
        from fastpetl.skip.compaction import call

        run = functools.partial(call, batch=None if skip is None else len(x))
        hidden = [] if hidden is None else hidden
        hidden.append((x, y))
        n = self.config.num_hidden_layers
        for i in range(n):
            new, seen = [], []
            for k, (stream, other, masks) in enumerate(((x, y, (mask, None)), (y, x, (None, mask)))):
                weights = None
                if not (skip and skip[k * n + i]):
                    stream, *weights = run(self._layers(k)[i], stream, other, *masks)
                elif shortcut == "adapter":
                    stream = run(self._shortcuts(k)[i], stream)
                new.append(stream)
                seen.append(None if weights is None else tuple(weights))
            x, y = new
            hidden.append((x, y))
            if maps is not None:
                maps.append(tuple(seen))
        return x, y

    def _fuse_per_sample(self, x, y, mask, policy, shortcut, hidden):
        from fastpetl.skip.compaction import call, streams

        n = self.config.num_hidden_layers
        pair, mask = streams((x, y), policy, 2 * n, self.training, mask)
        if hidden is not None:
            hidden.append((pair[0].whole(), pair[1].whole()))
        for i in range(n):
            x, y = pair[0].before(), pair[1].before()
            for k, (other, masks) in enumerate(((y, (mask, None)), (x, (None, mask)))):
                layer = self._layers(k)[i]

                def block(rows, take, layer=layer, other=other, masks=masks):
                    return call(layer, rows, take(other), *map(take, masks))[0]

                adapter = self._shortcuts(k)[i] if shortcut == "adapter" else nn.Identity()
                pair[k].run(i, block, adapter, layer.parameters(), adapter.parameters())
            if hidden is not None:
                hidden.append((pair[0].whole(), pair[1].whole()))
        return pair[0].whole(), pair[1].whole()

    def _layers(self, k: int) -> nn.ModuleList:
        return self.cross_modal_image_layers if k else self.cross_modal_text_layers

    def _shortcuts(self, k: int) -> nn.ModuleList:
        return self.adapter_list_v if k else self.adapter_list_l


def _additive(mask, dtype):
    """[B, T] of ones and zeros as [B, 1, 1, T] of zeros and -10000, as the original's transformers made it: SDPA's
    gradient is wrong where every token of a text is hidden by much more.
    """
    return None if mask is None else (1.0 - mask[:, None, None].to(dtype)) * -10000.0


def _head(inputs: int, hidden: int, labels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, labels))


class MeterForQuestionAnswering(MeterPreTrainedModel):
    """Semantics: VQA as classification (num_labels answers), or any other question about one image and one text.

    labels: soft targets [B, num_labels] (float): binary cross entropy, mean * num_labels, as METER's VQA; or classes
    [B] (int64): cross entropy, as its SNLI-VE. output_hidden_states, output_attentions: as `MeterModel`.
    """

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.meter = MeterModel(config)
        self.classifier = _head(2 * config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, pixel_values, attention_mask=None, labels=None, **asked):
        out = self.meter(input_ids, pixel_values, attention_mask, **asked)
        logits = self.classifier(out.pooler_output)
        loss = None
        if labels is not None and labels.is_floating_point():
            loss = F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )


class MeterForImagesAndTextClassification(MeterPreTrainedModel):
    """Semantics: NLVR2: a text about two images, pixel_values [B, 2, 3, H, W]; labels [B]: cross entropy."""

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        if config.type_vocab_size < 3:
            raise ValueError(
                f"MeterForImagesAndTextClassification: type_vocab_size is {config.type_vocab_size}, expected 3: one "
                "row for the text and one for each image"
            )
        self.meter = MeterModel(config)
        self.classifier = _head(4 * config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, pixel_values, attention_mask=None, labels=None):
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"MeterForImagesAndTextClassification: pixel_values has shape {tuple(pixel_values.shape)}, expected "
                "(batch, 2, channels, height, width)"
            )
        images = enumerate(pixel_values.unbind(1), start=1)
        pooled = [self.meter(input_ids, image, attention_mask, i).pooler_output for i, image in images]
        logits = self.classifier(torch.cat(pooled, -1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """Semantics: one score per pair of text and image, logits [B, 1].

    labels [G]: the pairs are G groups of B / G in a row, labels[g] is the right one of group g: cross entropy over each
    group's scores, METER's ranking loss where the right pair comes first (zeros).
    """

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.meter = MeterModel(config)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, pixel_values, attention_mask=None, labels=None):
        logits = self.rank_output(self.meter(input_ids, pixel_values, attention_mask).pooler_output)
        loss = None
        if labels is not None:
            if labels.dim() != 1 or logits.shape[0] % labels.shape[0]:
                raise ValueError(
                    f"MeterForImageAndTextRetrieval: labels has shape {tuple(labels.shape)} for {logits.shape[0]} "
                    "pairs, expected one per group of equally many pairs"
                )
            loss = F.cross_entropy(logits.view(labels.shape[0], -1), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
