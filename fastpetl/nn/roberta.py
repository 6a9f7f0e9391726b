"""RoBERTa's modules in transformers, fused: BERT's under other names."""

from __future__ import annotations

from transformers.models.roberta import modeling_roberta as hf

from fastpetl.nn.bert import fuse

globals().update(fuse(__name__, hf, "Roberta", ("RobertaLayer",)))
