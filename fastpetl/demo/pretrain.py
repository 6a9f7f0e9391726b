"""The script that made assets/backbone.safetensors: a small ViLT taught on easy-VQA's yes/no training questions.

    python -m fastpetl.demo.make_assets
    python -m fastpetl.demo.pretrain --work pretrain-run --bf16

The objective is ViLT's masked language modelling in small.  A yes/no question and its answer say what the image shows
("is there a circle?" yes, "is no red shape present?" no); the colour or shape in such a question is hidden, and the
model tells it, once at the word itself and once from the pooled output that question answering reads.  Answering yes
or no is not part of it: that stayed at chance for two thousand steps.  The open questions, which are the downstream
task, and the test split are not read.  One training image in twenty is kept aside to watch generalisation.  The run
checkpoints into --work and resumes from there; the exported weights are fp16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import data

HOLD_OUT = 20  # every 20th image


def informative(question: data.Question) -> bool:
    """True of questions that say, with their answer, what the image shows: "is there a circle?" yes."""
    negated = " not " in question.text or " no " in question.text
    return (question.answer == "yes") != negated


class Pretext:
    """Batches of true statements with the colour or shape hidden."""

    def __init__(self, seed: int, quiet: bool = False):
        questions = [q for q in data.pretext(data.load_questions("train")) if informative(q)]
        images = data.load_images("train", (q.image for q in questions), quiet=quiet)
        tokenizer = data.load_tokenizer()
        train = [q for q in questions if q.image % HOLD_OUT]
        self.train = data.Tensors(train, images, tokenizer)
        self.held_out = data.Tensors([q for q in questions if q.image % HOLD_OUT == 0], images, tokenizer)
        # "a red shape" tells the colour, "a circle" the shape
        colour = torch.tensor([" shape" in q.text for q in train])
        self.colour, self.shape = colour.nonzero().flatten(), (~colour).nonzero().flatten()
        self.names = data.COLOURS + data.SHAPES
        self.words = torch.tensor(tokenizer.convert_tokens_to_ids(list(self.names)))
        self.mask_id, self.unknown_id = tokenizer.mask_token_id, tokenizer.unk_token_id
        self.rng = torch.Generator().manual_seed(seed)

    def _draw(self, pool: torch.Tensor, n: int) -> torch.Tensor:
        return pool[torch.randint(len(pool), (n,), generator=self.rng)]

    def augment(self, pixels: torch.Tensor, margin: int = 5) -> torch.Tensor:
        """Mirror and shift each image (edges repeated): neither changes the colour or the shape."""
        flip = torch.rand(len(pixels), generator=self.rng) < 0.5
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        padded, (h, w) = F.pad(pixels, [margin] * 4, mode="replicate"), pixels.shape[-2:]
        shifts = torch.randint(2 * margin + 1, (len(pixels), 2), generator=self.rng).tolist()
        return torch.stack([image[:, y : y + h, x : x + w] for image, (y, x) in zip(padded, shifts, strict=True)])

    def wrong(self, words: torch.Tensor) -> torch.Tensor:
        """For each word one of its kind, a colour for a colour, drawn at random (perhaps itself)."""
        n = len(data.COLOURS)
        colours = self.words[torch.randint(n, words.shape, generator=self.rng)]
        shapes = self.words[n + torch.randint(len(data.SHAPES), words.shape, generator=self.rng)]
        return torch.where(torch.isin(words, self.words[:n]), colours, shapes)

    def masked(self, tensors: data.Tensors, indices: torch.Tensor, replaced: float = 0.0):
        """(inputs, where the masked words are [n, MAX_TEXT], the words as token ids, as indices into ANSWERS).

        A share ``replaced`` of the words is not masked but replaced by a random one, as in BERT's objective: a model
        that only ever sees masks takes a colour it is shown later on for the answer.
        """
        inputs = tensors.batch(indices)
        hidden = torch.isin(inputs["input_ids"], self.words)
        words = inputs["input_ids"][hidden]
        keep = torch.rand(words.shape, generator=self.rng) < replaced
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][hidden] = torch.where(keep, self.wrong(words), self.mask_id)
        answers = (words[:, None] == self.words).int().argmax(1) + len(data.YES_NO)
        return inputs, hidden, words, answers

    def batch(self, size: int):
        """A training batch.  Three words in four are shapes, which take ten times as long to learn as the colours."""
        indices = [self._draw(self.colour, size // 4), self._draw(self.shape, size - size // 4)]
        inputs, hidden, words, answers = self.masked(self.train, torch.cat(indices), replaced=0.5)
        inputs["pixel_values"] = self.augment(inputs["pixel_values"])
        inputs["input_ids"] = self.forget(inputs["input_ids"], hidden)
        return inputs, hidden, words, answers

    def forget(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Make a share of each statement's words [UNK], drawn evenly between none and all.

        Otherwise all hangs on the word "shape", which is in every statement about a colour and asks for the opposite in
        the open questions.
        """
        share = torch.rand(len(ids), 1, generator=self.rng)
        ordinary = (ids > self.mask_id) & ~hidden
        return torch.where(ordinary & (torch.rand(ids.shape, generator=self.rng) < share), self.unknown_id, ids)


class Teacher(torch.nn.Module):
    """The ViLT and the bias of its masked-word head (the head's weights are the word embeddings)."""

    def __init__(self, init_std: float):
        super().__init__()
        data.offline()
        from transformers import ViltConfig, ViltForQuestionAnswering

        config = ViltConfig.from_pretrained(str(data.ASSETS))
        config.initializer_range = init_std
        self.model = ViltForQuestionAnswering(config)
        self.word_bias = torch.nn.Parameter(torch.zeros(config.vocab_size))
        for name in ("cls_token", "position_embeddings"):
            torch.nn.init.normal_(getattr(self.model.vilt.embeddings, name), std=init_std)

    def losses(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy at the masked word, cross-entropy from the pooled output)."""
        inputs, hidden, words, answers = batch
        out = self.model.vilt(**inputs)
        at_word = out.last_hidden_state[:, : hidden.shape[1]][hidden]
        table = self.model.vilt.embeddings.text_embeddings.word_embeddings.weight
        pooled = self.model.classifier(out.pooler_output)
        return F.cross_entropy(F.linear(at_word, table, self.word_bias), words), F.cross_entropy(pooled, answers)


@torch.no_grad()
def held_out_accuracy(model, source: Pretext, batch: int = 100) -> dict[str, float]:
    """Share of masked colours and shapes that the pooled output tells rightly, on the held-out images."""
    hits, colours = [], []
    model.eval()
    for indices in torch.arange(len(source.held_out)).split(batch):
        inputs, _, _, answers = source.masked(source.held_out, indices)
        hits.append(model(**inputs).logits.argmax(-1) == answers)
        colours.append(answers < len(data.YES_NO + data.COLOURS))
    model.train()
    hit, colour = torch.cat(hits).float(), torch.cat(colours)
    return {"colours": round(hit[colour].mean().item(), 4), "shapes": round(hit[~colour].mean().item(), 4)}


def export(model, path: Path) -> None:
    """Write the backbone (all but the classifier, which belongs to the pretext task) as fp16 safetensors."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if k.startswith("vilt.")}
    save_file(tensors, str(path), metadata={"format": "pt", "made_by": "fastpetl.demo.pretrain"})


def schedule(step: int, steps: int, warm_up: int = 300) -> float:
    """Learning-rate factor: linear warm-up, cosine to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimizer_for(teacher: Teacher, lr: float) -> torch.optim.Optimizer:
    """AdamW, weight decay on matrices only."""
    decay = [p for p in teacher.parameters() if p.ndim > 1]
    other = [p for p in teacher.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def save_state(file: Path, step: int, source: Pretext, teacher: Teacher, optimizer) -> None:
    """Write all that a resumed run needs; the old file is whole until the new one is."""
    random = [source.rng.get_state(), torch.get_rng_state()]
    state = {"step": step, "random": random, "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def resume(file: Path, source: Pretext, teacher: Teacher, optimizer) -> int:
    """The step to go on from: 0 without a checkpoint."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    source.rng.set_state(state["random"][0])
    torch.set_rng_state(state["random"][1])
    teacher.load_state_dict(state["teacher"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train(args) -> None:
    torch.manual_seed(args.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    source, teacher = Pretext(args.seed), Teacher(args.init_std)
    optimizer = optimizer_for(teacher, args.lr)
    first, recent = resume(work / "state.pt", source, teacher, optimizer), []
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = torch.stack(teacher.losses(source.batch(args.batch))).float()
        optimizer.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        recent.append(losses.detach())
        if (step + 1) % args.every == 0:
            word, pooled = torch.stack(recent).mean(0).tolist()
            line = {"step": step + 1, "seconds": round(time.monotonic() - args.start), "word": round(word, 4)}
            line |= {"pooled": round(pooled, 4), "held_out": held_out_accuracy(teacher.model, source)}
            print(json.dumps(line), flush=True)
            recent.clear()
            save_state(work / "state.pt", step + 1, source, teacher, optimizer)
    export(teacher.model, Path(args.out))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpetl.demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="pretrain-run", help="folder for checkpoints")
    parser.add_argument("--out", default=str(data.ASSETS / "backbone.safetensors"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--init-std", type=float, default=0.04)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--bf16", action="store_true", help="autocast; twice as fast on a CPU with AMX")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.start = time.monotonic()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
