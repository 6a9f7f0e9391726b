"""The script that made assets/backbone.safetensors: a small VL-BART taught to fill in words of captions.

    python examples/make_backbone.py

VL-BART's pre-training in small: "denoise : a <mask> circle" and the image give "a red circle". It reads the even
training images of easy-VQA; no question, no odd image and no test image. One even image in ten is kept aside to watch
generalisation. The exported weights are fp16. 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import easy_vl as ev
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from fastpetl.models import VLBart, VLBartConfig

SIZES = {
    "d_model": 96,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 384,
    "decoder_ffn_dim": 384,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_dim": ev.FEATURES,
    "n_boxes": ev.SIDE**2,
    "n_images": 1,
    "downsample": False,
    "forced_eos_token_id": None,
}


def masked(caption: str, image: int, rng: random.Random) -> ev.Sample:
    article, colour, shape = caption.split()
    hide = rng.choice([(True, False), (False, True), (True, True)])
    text = " ".join([article, "<mask>" if hide[0] else colour, "<mask>" if hide[1] else shape])
    return ev.Sample("denoise", f"denoise : {text}", caption, image)


def shifted(feats: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The images of [B, 36, 192] mirrored by chance: the shape and the colour stay."""
    if rng.random() < 0.5:
        return feats
    grid = feats.unflatten(1, (ev.SIDE, ev.SIDE)).unflatten(3, (3, ev.PATCH, ev.PATCH))
    return grid.flip(2).flip(-1).flatten(3).flatten(1, 2)


def train(steps: int, batch: int, lr: float, seed: int) -> VLBart:
    captions = {image: text for image, text in ev.captions("train").items() if image % 2 == 0}
    every = [s.text + " " + s.answer for s in ev.samples("train")] + ["denoise : a <mask> circle"]
    tokenizer = ev.Tokenizer.of(every)
    batches = ev.Batches(ev.features("train", captions), tokenizer)
    held = [image for image in captions if image % 20 == 0]
    kept = [image for image in captions if image % 20]
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = VLBart(VLBartConfig(vocab_size=len(tokenizer.names), **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    test = [masked(captions[image], image, random.Random(image)) for image in held]
    bar = tqdm(range(steps), desc="pre-train")
    for step in bar:
        given = batches.batch([masked(captions[i], i, rng) for i in rng.choices(kept, k=batch)])
        given["vis_feats"] = shifted(given["vis_feats"], rng)
        loss = model.train()(**given).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249 or step == steps - 1:
            model.eval()
            with torch.no_grad():
                out = model.generate(**batches.inputs(test), max_new_tokens=5, do_sample=False)
            right = sum(a == s.answer for a, s in zip(tokenizer.decode(out), test, strict=True)) / len(test)
            bar.write(f"step {step + 1}: loss {loss.item():.3f}, held-out captions {right:.3f}")
    tokenizer.save(ev.ASSETS)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ev.ASSETS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args.steps, args.batch, args.lr, args.seed)
    weights = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}
    save_file(weights, args.out / "backbone.safetensors")
    (args.out / "config.json").write_text(json.dumps({**SIZES, "vocab_size": model.config.vocab_size}, indent=2) + "\n")


if __name__ == "__main__":
    main()
