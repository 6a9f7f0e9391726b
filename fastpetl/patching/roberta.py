"""RoBERTa (Hugging Face transformers): patch rules, and where VL-Adapter's methods go."""

from __future__ import annotations

from fastpetl.patching._bert_like import BertLikeFamily, bert_rules, text_prompts

_HF = "transformers.models.roberta.modeling_roberta"
RULES = bert_rules("roberta", _HF, "Roberta", ("RobertaLayer",), "fastpetl.nn.roberta", routed=("RobertaLayer",))


class RobertaFamily(BertLikeFamily):
    """Answers for a RobertaModel (the host) what attaching, skipping and counting ask."""

    name = "RoBERTa (transformers)"
    module = _HF
    host_classes = ("RobertaModel",)
    layer_classes = (f"{_HF}:RobertaLayer",)
    prompted = text_prompts(_HF, "Roberta")
    offset = True


FAMILY = RobertaFamily()
