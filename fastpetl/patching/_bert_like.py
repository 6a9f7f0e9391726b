"""Patch rules for BERT's modules under the names of BERT, RoBERTa and BridgeTower in transformers."""

from __future__ import annotations

from fastpetl.patching._prompts import TakesPrompts
from fastpetl.patching._seq2seq import attention_check, attention_note, original_signature
from fastpetl.patching._sites import LayerFamily
from fastpetl.patching._turns import Blocks
from fastpetl.patching.registry import Rule

_FORWARD = {  # what the fused classes were written for
    "SelfAttention": ["hidden_states", "attention_mask", "past_key_values", "kwargs"],
    "CrossAttention": ["hidden_states", "encoder_hidden_states", "attention_mask", "past_key_values", "kwargs"],
    "SelfOutput": ["hidden_states", "input_tensor"],
    "Output": ["hidden_states", "input_tensor"],
    "Intermediate": ["hidden_states"],
}

OUTPUTS = {"attention.output.dense": False, "crossattention.output.dense": True, "output.dense": False}


class BertLikeFamily(TakesPrompts, LayerFamily):
    """A family whose layers are BERT's."""

    outputs = OUTPUTS
    queries_and_values = ("query", "value")
    adapterhub = ((r"\.dense\.output_adapter$", ".adapters"),)  # where its adapters stand: (here, there)
    offset = False  # are positions counted from the padding token's on?

    def streams(self, host) -> list:
        from fastpetl.nn.hf_turns import HFCalls

        tokens = host.config.max_position_embeddings - (host.config.pad_token_id + 1 if self.offset else 0)
        return [Blocks("encoder.layer", "text", HFCalls(host.config), (tokens,))]


def text_prompts(library: str, prefix: str) -> dict:
    """Semantics: `TakesPrompts.prompted` of a copy of BERT in the module `library`."""
    parts = {"": (f"{prefix}Model", "PromptedText"), "embeddings": (f"{prefix}Embeddings", "PromptedEmbeddings")}
    return {(library, f"{prefix}Model"): parts}


def intermediate_note(intermediate) -> str:
    """Semantics: what `report` says of an intermediate's activation."""
    from fastpetl.nn.activations import recognised

    act = intermediate.intermediate_act_fn
    name = getattr(act, "__name__", act)
    return "" if recognised(act) else f"activation {name} is not the exact GELU or a ReLU and runs as it is"


def bert_rules(
    family: str, library: str, prefix: str, layers: tuple[str, ...], fused: str, routed=()
) -> tuple[Rule, ...]:
    """Semantics: the rules of a copy of BERT's modules: `prefix`SelfAttention and so on of the module `library`, the
    fused classes in the module `fused`. routed: the layers that may be told a task (`fastpetl.nn.task_layers`).
    """
    expected = {f"{prefix}{name}": names for name, names in _FORWARD.items()}

    def signature(*names: str) -> str | None:
        reasons = (original_signature(library, f"{prefix}{name}", expected) for name in names)
        return next((reason for reason in reasons if reason is not None), None)

    def check_attention(attention) -> str | None:
        from fastpetl.nn.bert import PROJECTIONS

        name = "SelfAttention" if hasattr(attention, "is_decoder") else "CrossAttention"
        return signature(name) or attention_check(attention, PROJECTIONS)

    def check_output(output) -> str | None:
        from fastpetl.nn.bert import OUTPUT
        from fastpetl.nn.inline import structure_reason

        return signature("SelfOutput") or structure_reason(output, OUTPUT)

    attention = {"check": check_attention, "ops": ("linear", "attention"), "note": attention_note}
    return (
        Rule(
            f"{family}.attention",
            f"{library}:{prefix}SelfAttention",
            f"{fused}:Fused{prefix}SelfAttention",
            **attention,
        ),
        Rule(
            f"{family}.attention",
            f"{library}:{prefix}CrossAttention",
            f"{fused}:Fused{prefix}CrossAttention",
            **attention,
        ),
        Rule(
            f"{family}.output",
            f"{library}:{prefix}SelfOutput",
            f"{fused}:Fused{prefix}SelfOutput",
            check_output,
            ops=("linear", "residual_norm"),
        ),
        *(
            Rule(
                f"{family}.layer",
                f"{library}:{name}",
                f"{fused}:Fused{name}",
                lambda layer, name=name: (
                    signature("Output", "Intermediate") or check_layer(layer, f"{fused}:Fused{name}")
                ),
                ops=("linear", "residual_norm"),
                note=layer_note,
            )
            for name in layers
        ),
        *(
            Rule(
                f"{family}.layer",
                f"fastpetl.nn.task_layers:Task{name}",
                f"{fused}:FusedTask{name}",
                lambda layer, name=name: (
                    signature("Output", "Intermediate") or check_layer(layer, f"{fused}:FusedTask{name}")
                ),
                ops=("linear", "residual_norm"),
                note=layer_note,
            )
            for name in routed
        ),
    )


def check_layer(layer, fused: str) -> str | None:
    """Semantics: why the feed-forward of a layer cannot be fused by the class named, or None."""
    from fastpetl.nn.inline import structure_reason
    from fastpetl.patching.registry import load

    return structure_reason(layer, load(fused).structure_of(layer))


def layer_note(layer) -> str:
    from fastpetl.nn.parts import exact_gelu

    activation = layer.intermediate.intermediate_act_fn
    return "" if exact_gelu(activation) else f"activation {activation} is not the exact GELU and runs as it is"
