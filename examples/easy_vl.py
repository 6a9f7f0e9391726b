"""Four tasks for VL-BART made from easy-VQA (PyPI `easy-vqa`, MIT): colour, shape, yes/no questions and captions.

A sample is a task, a text with the task's prefix ("colour: what color is the circle ?"), an image as 6 x 6 features
(the pixels of its 8 x 8 patches, 36 visual tokens as in the paper) and an answer to be generated ("red", "a red
circle"). The pre-training reads the even training images only, the tasks the odd ones and the test split.
"""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from fastpetl.demo import data

ASSETS = Path(__file__).resolve().parent / "assets"
TASKS = ("colour", "shape", "yesno", "caption")
SIDE, PATCH = 6, 8
FEATURES = 3 * PATCH * PATCH
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # BART's ids 0 to 4


@dataclasses.dataclass(frozen=True)
class Sample:
    task: str
    text: str
    answer: str
    image: int


def captions(split: str) -> dict[int, str]:
    """image -> "a red circle", from the answers to the open questions about it."""
    found: dict[int, dict[str, str]] = {}
    for q in data.downstream(data.load_questions(split)):
        kind = "colour" if q.answer in data.COLOURS else "shape"
        found.setdefault(q.image, {})[kind] = q.answer
    return {image: f"a {f['colour']} {f['shape']}" for image, f in sorted(found.items()) if len(f) == 2}


def samples(split: str, keep=lambda image: True) -> list[Sample]:
    """The four tasks' samples of the images `keep` holds of."""
    out = []
    for q in data.load_questions(split):
        task = "yesno" if q.answer in data.YES_NO else "colour" if q.answer in data.COLOURS else "shape"
        out.append(Sample(task, f"{task} : {q.text}", q.answer, q.image))
    out += [Sample("caption", "caption : describe the image", text, image) for image, text in captions(split).items()]
    return [sample for sample in out if keep(sample.image)]


def features(split: str, ids, quiet: bool = False) -> dict[int, torch.Tensor]:
    """image -> [36, 192]."""
    out = {}
    for image, pixels in data.load_images(split, ids, quiet=quiet).items():
        small = F.interpolate(pixels[None], size=SIDE * PATCH, mode="area")
        out[image] = F.unfold(small, PATCH, stride=PATCH)[0].T.contiguous()
    return out


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[?:]|<mask>", text.lower())


class Tokenizer:
    """Words to ids and back; the vocabulary ends with the visual tokens' names, as VL-BART's does."""

    def __init__(self, vocabulary: list[str]):
        self.names = list(vocabulary)
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.bos, self.pad, self.eos, self.unknown, self.mask = (self.ids[name] for name in SPECIAL)

    @classmethod
    def of(cls, texts) -> Tokenizer:
        found = sorted({word for text in texts for word in words(text)} - set(SPECIAL))
        return cls([*SPECIAL, *found, *(f"<vis_extra_id_{i}>" for i in reversed(range(SIDE * SIDE)))])

    @classmethod
    def load(cls, folder: Path = ASSETS) -> Tokenizer:
        return cls((folder / "vocab.txt").read_text(encoding="utf-8").split())

    def save(self, folder: Path) -> None:
        (folder / "vocab.txt").write_text("\n".join(self.names) + "\n", encoding="utf-8")

    def encode(self, texts, *, start: bool) -> torch.Tensor:
        rows = [[self.ids.get(w, self.unknown) for w in words(text)] + [self.eos] for text in texts]
        rows = [[self.bos, *row] if start else row for row in rows]
        longest = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])

    def decode(self, ids: torch.Tensor) -> list[str]:
        special = {self.bos, self.pad, self.eos}
        return [" ".join(self.names[i] for i in row if i not in special) for row in ids.tolist()]


class Batches:
    """Samples as keyword arguments of VL-BART: `batch(samples)` with labels, `inputs(samples)` for generation."""

    def __init__(self, images: dict[int, torch.Tensor], tokenizer: Tokenizer):
        self.images, self.tokenizer = images, tokenizer

    def inputs(self, chosen: list[Sample]) -> dict:
        ids = self.tokenizer.encode([s.text for s in chosen], start=True)
        mask = (ids != self.tokenizer.pad).long()
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "vis_feats": torch.stack([self.images[s.image] for s in chosen]),
        }

    def batch(self, chosen: list[Sample]) -> dict:
        labels = self.tokenizer.encode([s.answer for s in chosen], start=False)
        return {**self.inputs(chosen), "labels": labels.masked_fill(labels == self.tokenizer.pad, -100)}


def proportional(by_task: dict[str, list], rng: random.Random, size: int, mixed: bool) -> list:
    """A batch of tasks drawn by how many samples they have: one task per sample (mixed) or one for the whole batch."""
    names, weights = list(by_task), [len(s) for s in by_task.values()]
    drawn = rng.choices(names, weights, k=size) if mixed else rng.choices(names, weights) * size
    return [rng.choice(by_task[name]) for name in drawn]
