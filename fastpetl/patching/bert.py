"""BERT (Hugging Face transformers): patch rules."""

from __future__ import annotations

from fastpetl.patching._bert_like import bert_rules

RULES = bert_rules("bert", "transformers.models.bert.modeling_bert", "Bert", ("BertLayer",), "fastpetl.nn.bert")
