"""BridgeTower (Hugging Face transformers): patch rules for its text and cross-modal layers, and blocks to skip."""

from __future__ import annotations

import sys

from fastpetl.patching._bert_like import bert_rules
from fastpetl.patching._turns import Blocks, SkipsTurns

_HF = "transformers.models.bridgetower.modeling_bridgetower"
_LAYERS = ("BridgeTowerTextLayer", "BridgeTowerBertCrossLayer")
RULES = bert_rules("bridgetower", _HF, "BridgeTower", _LAYERS, "fastpetl.nn.bridgetower")


class BridgeTowerFamily(SkipsTurns):
    """Answers for a BridgeTowerModel (the host) what skipping and counting ask; blocks are numbered as METER's: the
    cross-modal text layers, then the image layers. Both of a pair read the pair before.
    """

    name = "BridgeTower (transformers)"
    routes_samples = False

    def hosts(self, module) -> bool:
        library = sys.modules.get(_HF)
        return library is not None and isinstance(module, library.BridgeTowerModel)

    def streams(self, host) -> list[Blocks]:
        from fastpetl.nn.turns import Calls

        text, vision = host.config.text_config, host.config.vision_config
        tokens = [
            text.max_position_embeddings - text.pad_token_id - 1,
            (vision.image_size // vision.patch_size) ** 2 + 1,
        ]
        calls = Calls(form=3, mask_at=2, one_copy="BridgeTower, whose bridges bring in the towers' states of one copy,")
        return [
            Blocks("cross_modal_text_layers", "text", calls, tuple(tokens)),
            Blocks("cross_modal_image_layers", "image", calls, tuple(tokens[::-1])),
        ]

    def example(self, blocks, layer, empty) -> dict:
        own, other = blocks.lengths
        return {"hidden_states": empty(own), "encoder_hidden_states": empty(other)}


FAMILY = BridgeTowerFamily()
