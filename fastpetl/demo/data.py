"""easy-VQA as tensors: the questions and images of the PyPI package ``easy-vqa``, read from its own files.

The package holds 5,000 images of one coloured shape each and 48,248 questions with 13 answers.  The questions are split
by kind: the shipped backbone was taught with the yes/no ones (the pretext task), the open ones ("what color is the
circle?", 11 answers) are the downstream task of the demo.  Nothing here touches the network.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parent / "assets"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("no", "yes")
ANSWERS = YES_NO + COLOURS + SHAPES  # the label order of the backbone's classifier
MAX_TEXT = 12  # the longest question has 9 words, a question mark, [CLS] and [SEP]


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of easy-VQA: a question, its answer and the image it is about."""

    text: str
    answer: str
    image: int

    @property
    def is_pretext(self) -> bool:
        return self.answer in YES_NO


def offline() -> None:
    """Tell Hugging Face libraries to stay off the network; call it before importing transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _package():
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("demo: the package easy-vqa is not installed: pip install 'fastpetl[demo]'") from error
    return easy_vqa


def load_questions(split: str) -> list[Question]:
    """All questions of ``split`` ("train" or "test"), in the package's order."""
    package = _package()
    readers = {"train": package.get_train_questions, "test": package.get_test_questions}
    if split not in readers:
        raise ValueError(f"load_questions: split is {split!r}, expected 'train' or 'test'")
    return [Question(text, answer, image) for text, answer, image in zip(*readers[split](), strict=True)]


def pretext(questions: Iterable[Question]) -> list[Question]:
    """The yes/no questions."""
    return [q for q in questions if q.is_pretext]


def downstream(questions: Iterable[Question]) -> list[Question]:
    """The open questions: what colour, what shape."""
    return [q for q in questions if not q.is_pretext]


def load_tokenizer(assets: Path = ASSETS):
    """Hugging Face's BertTokenizer over the small vocabulary in ``assets``."""
    offline()
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(str(assets))


def load_image_processor(assets: Path = ASSETS):
    """Hugging Face's ViLT image processor with the small image size in ``assets``.

    The PIL implementation, because the other one needs torchvision; older transformers have only the PIL one, under the
    plain name.
    """
    offline()
    try:
        from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil as Processor
    except ImportError:
        from transformers import ViltImageProcessor as Processor
    return Processor.from_pretrained(str(assets))


def progress(iterable, *, quiet: bool = False, **options):
    """A tqdm bar over ``iterable``."""
    from tqdm import tqdm

    return tqdm(iterable, disable=quiet, dynamic_ncols=True, **options)


def load_images(
    split: str, ids: Iterable[int], *, assets: Path = ASSETS, quiet: bool = False
) -> dict[int, torch.Tensor]:
    """Decode and preprocess the images ``ids`` of ``split``: {id: float32 [3, height, width]}."""
    from PIL import Image

    package = _package()
    paths = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
    processor = load_image_processor(assets)
    images, ids = {}, sorted(set(ids))
    for start in progress(range(0, len(ids), 50), desc=f"images ({split})", unit="x50", quiet=quiet):
        chunk = ids[start : start + 50]
        pixels = processor([Image.open(paths[i]).convert("RGB") for i in chunk], return_tensors="pt")["pixel_values"]
        images.update(zip(chunk, pixels, strict=True))
    return images


class Tensors:
    """Questions as tensors kept in memory; ``batch(indices)`` gives the keyword arguments of ViltForQuestionAnswering.

    Shapes: input_ids and attention_mask int64 [n, MAX_TEXT], pixel_values float32 [images, 3, h, w] (each image once),
    answers int64 [n] (indices into ANSWERS).
    """

    def __init__(self, questions: list[Question], images: dict[int, torch.Tensor], tokenizer):
        if not questions:
            raise ValueError("Tensors: questions is empty, expected at least one")
        text = tokenizer(
            [q.text for q in questions],
            padding="max_length",
            max_length=MAX_TEXT,
            truncation=False,
            return_tensors="pt",
        )
        if text["input_ids"].shape[1] != MAX_TEXT:
            raise ValueError(
                f"Tensors: a question has {text['input_ids'].shape[1]} tokens, expected at most {MAX_TEXT}"
            )
        ids = sorted(images)
        position = {image: i for i, image in enumerate(ids)}
        self.questions = questions
        self.input_ids, self.attention_mask = text["input_ids"], text["attention_mask"]
        self.pixel_values = torch.stack([images[i] for i in ids])
        self.image = torch.tensor([position[q.image] for q in questions])
        self.answers = torch.tensor([ANSWERS.index(q.answer) for q in questions])

    def __len__(self) -> int:
        return len(self.questions)

    def part(self, start: int, stop: int) -> Tensors:
        """Questions start..stop-1; the images are shared."""
        part = copy.copy(self)
        part.questions = self.questions[start:stop]
        for name in ("input_ids", "attention_mask", "image", "answers"):
            setattr(part, name, getattr(self, name)[start:stop])
        return part

    def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = self.pixel_values[self.image[indices]]
        return {
            "input_ids": self.input_ids[indices],
            "attention_mask": self.attention_mask[indices],
            "pixel_values": pixels,
            "pixel_mask": pixels.new_ones((len(indices), *pixels.shape[-2:]), dtype=torch.long),
        }


def load(split: str, kind: str, *, limit: int | None = None, assets: Path = ASSETS, quiet: bool = False) -> Tensors:
    """Questions of ``split`` and ``kind`` ("pretext" or "downstream") with their images; ``limit``: only the first."""
    kinds = {"pretext": pretext, "downstream": downstream}
    if kind not in kinds:
        raise ValueError(f"load: kind is {kind!r}, expected 'pretext' or 'downstream'")
    questions = kinds[kind](load_questions(split))[:limit]
    images = load_images(split, (q.image for q in questions), assets=assets, quiet=quiet)
    return Tensors(questions, images, load_tokenizer(assets))
