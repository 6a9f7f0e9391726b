"""The script that made assets/backbone.safetensors: a small ViLT taught on easy-VQA's yes/no training questions.

    python -m fastpetl.demo.make_assets
    python -m fastpetl.demo.pretrain --work pretrain-run --minutes 45 --threads 1

Two objectives, ViLT's own in small: answer the yes/no question, and fill in the masked colour or shape of a question that is
true of its image.  Open questions (the downstream task) and the test split are not read.  One training image in twenty is kept
aside to watch generalisation.  The run checkpoints into --work and resumes from there; the exported weights are fp16.
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
    """True of questions whose answer says what the image shows: "is there a circle?" yes, "is no circle present?" no."""
    negated = " not " in question.text or " no " in question.text
    return (question.answer == "yes") != negated


class Pretext:
    """Batches of yes/no questions and masked true statements.

    Three yes/no questions in eight, not one, are drawn from the informative ones: otherwise the wording alone tells 83 % of the
    answers and the image goes unread for a long time.
    """

    def __init__(self, seed: int, quiet: bool = False):
        questions = data.pretext(data.load_questions("train"))
        images = data.load_images("train", (q.image for q in questions), quiet=quiet)
        tokenizer = data.load_tokenizer()
        train = [q for q in questions if q.image % HOLD_OUT]
        self.train = data.Tensors(train, images, tokenizer)
        self.held_out = data.Tensors([q for q in questions if q.image % HOLD_OUT == 0], images, tokenizer)
        true = torch.tensor([informative(q) for q in train])
        self.true, self.other = true.nonzero().flatten(), (~true).nonzero().flatten()
        attributes = tokenizer.convert_tokens_to_ids([*data.COLOURS, *data.SHAPES])
        self.attributes, self.mask_id = torch.tensor(attributes), tokenizer.mask_token_id
        self.rng = torch.Generator().manual_seed(seed)

    def _draw(self, pool: torch.Tensor, n: int) -> torch.Tensor:
        return pool[torch.randint(len(pool), (n,), generator=self.rng)]

    def augment(self, pixels: torch.Tensor, margin: int = 5) -> torch.Tensor:
        """Mirror and shift each image (edges repeated): neither changes the colour or the shape."""
        flip = torch.rand(len(pixels), generator=self.rng) < 0.5
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        padded, (h, w) = F.pad(pixels, [margin] * 4, mode="replicate"), pixels.shape[-2:]
        shifts = torch.randint(2 * margin + 1, (len(pixels), 2), generator=self.rng).tolist()
        return torch.stack([image[:, y : y + h, x : x + w] for image, (y, x) in zip(padded, shifts)])

    def batch(self, size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, int]:
        """(inputs, yes/no labels of the first rows, masked words of the rest, how many are first)."""
        masked = size // 4
        indices = torch.cat([self._draw(self.other, size * 3 // 8), self._draw(self.true, size - size * 3 // 8)])
        inputs, first = self.train.batch(indices), size - masked
        inputs["pixel_values"] = self.augment(inputs["pixel_values"])
        words = torch.isin(inputs["input_ids"][first:], self.attributes)
        targets = inputs["input_ids"][first:][words]
        inputs["input_ids"][first:][words] = self.mask_id
        return inputs, self.train.answers[indices[:first]], targets, first


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

    def losses(self, batch, mask_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, answers, words, first = batch
        out = self.model.vilt(**inputs)
        yes_no = self.model.classifier(out.pooler_output[:first])[:, : len(data.YES_NO)]
        text = out.last_hidden_state[first:, : inputs["input_ids"].shape[1]]
        masked = text[inputs["input_ids"][first:] == mask_id]
        table = self.model.vilt.embeddings.text_embeddings.word_embeddings.weight
        return F.cross_entropy(yes_no, answers), F.cross_entropy(F.linear(masked, table, self.word_bias), words)


@torch.no_grad()
def held_out_accuracy(model, tensors: data.Tensors, limit: int = 600) -> float:
    """Accuracy on yes/no questions about held-out images, informative and other ones weighing the same."""
    indices = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0))[:limit]
    hits, true = [], torch.tensor([informative(tensors.questions[i]) for i in indices.tolist()])
    model.eval()
    for chunk in indices.split(100):
        logits = model(**tensors.batch(chunk)).logits[:, : len(data.YES_NO)]
        hits.append(logits.argmax(-1) == tensors.answers[chunk])
    model.train()
    hit = torch.cat(hits).float()
    return (hit[true].mean().item() + hit[~true].mean().item()) / 2


def export(model, path: Path) -> None:
    """Write the backbone (all but the classifier, which belongs to the pretext task) as fp16 safetensors."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if k.startswith("vilt.")}
    save_file(tensors, str(path), metadata={"format": "pt", "made_by": "fastpetl.demo.pretrain"})


def schedule(elapsed: float, step: int, warmup: int = 300) -> float:
    """Learning-rate factor: linear warm-up by steps, then cosine to zero by the share ``elapsed`` of the time given."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed)))


def train(args) -> None:
    torch.manual_seed(args.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    source, teacher = Pretext(args.seed), Teacher(args.init_std)
    decay = [p for p in teacher.parameters() if p.ndim > 1]
    other = [p for p in teacher.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    step, spent, state = 0, 0.0, work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        teacher.load_state_dict(saved["teacher"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
    start, running = time.monotonic() - spent, None
    while (spent := time.monotonic() - start) < args.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(spent / (args.minutes * 60), step)
        losses = torch.stack(teacher.losses(source.batch(args.batch), source.mask_id))
        optimizer.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = losses.detach() if running is None else running.lerp(losses.detach(), 0.02)
        if step % args.every == 0:
            accuracy = held_out_accuracy(teacher.model, source.held_out)
            line = {"step": step, "minutes": round(spent / 60, 2), "yes_no": round(running[0].item(), 4)}
            line |= {"masked": round(running[1].item(), 4), "held_out": round(accuracy, 4)}
            print(json.dumps(line), flush=True)
            saved = {"teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
            torch.save(saved, work / "state.tmp")
            (work / "state.tmp").replace(state)
            export(teacher.model, work / "backbone.safetensors")
    export(teacher.model, Path(args.out))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpetl.demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="pretrain-run", help="folder for checkpoints")
    parser.add_argument("--out", default=str(data.ASSETS / "backbone.safetensors"))
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--init-std", type=float, default=0.04)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
