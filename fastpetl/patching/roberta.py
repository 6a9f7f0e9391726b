"""RoBERTa (Hugging Face transformers): patch rules."""

from __future__ import annotations

from fastpetl.patching._bert_like import bert_rules

_HF = "transformers.models.roberta.modeling_roberta"
RULES = bert_rules("roberta", _HF, "Roberta", ("RobertaLayer",), "fastpetl.nn.roberta")
