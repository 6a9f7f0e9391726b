"""Write the small files beside the backbone: vocabulary, tokenizer, image processor and model configuration.

    python -m fastpetl.demo.make_assets

The vocabulary is the words of the training questions, so the test split has no say in it.
"""

from __future__ import annotations

import json
from pathlib import Path

from .data import ANSWERS, ASSETS, MAX_TEXT, load_questions

IMAGE_SIZE = 48  # 64 px shrunk to 36 patches of 8 px: a third fewer tokens than 64 px at the same patch
PATCH = 8
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary() -> list[str]:
    """Special tokens, then every word of the training questions and every answer."""
    words = {word for q in load_questions("train") for word in q.text.lower().replace("?", " ?").split()}
    return [*SPECIAL, *sorted(words | set(ANSWERS))]


def write(assets: Path = ASSETS) -> None:
    """Write all files but the weights into ``assets``."""
    from transformers import ViltConfig

    assets.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    (assets / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": MAX_TEXT}
    (assets / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    processor = {
        "image_processor_type": "ViltImageProcessor",
        "size": {"shortest_edge": IMAGE_SIZE},
        "size_divisor": PATCH,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (assets / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    config = ViltConfig(
        vocab_size=len(words),
        max_position_embeddings=MAX_TEXT,
        hidden_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        pad_token_id=0,
        id2label=dict(enumerate(ANSWERS)),
        label2id={answer: i for i, answer in enumerate(ANSWERS)},
    )
    config.save_pretrained(str(assets))


if __name__ == "__main__":
    write()
