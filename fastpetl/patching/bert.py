"""BERT (Hugging Face transformers): patch rules, and where VL-Adapter's methods go."""

from __future__ import annotations

from fastpetl.patching._bert_like import BertLikeFamily, bert_rules, text_prompts

_HF = "transformers.models.bert.modeling_bert"
RULES = bert_rules("bert", _HF, "Bert", ("BertLayer",), "fastpetl.nn.bert", routed=("BertLayer",))


class BertFamily(BertLikeFamily):
    """Answers for a BertModel (the host) what attaching, skipping and counting ask."""

    name = "BERT (transformers)"
    module = _HF
    host_classes = ("BertModel",)
    layer_classes = (f"{_HF}:BertLayer",)
    prompted = text_prompts(_HF, "Bert")


FAMILY = BertFamily()
