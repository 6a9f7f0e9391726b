"""What a call costs in Python, where torch's own kernels serve as they do on a GPU: benchmarks/host.py [model ...]

Models of the full number of layers and of next to no width, batch 1, on one thread of the CPU: what is left is the time
it takes to call the kernels, which on a GPU decides as soon as they are fast. `patch(backend="torch")` makes linears,
attention and norms torch's, as they are on a GPU; a site is one launch, here of the C++ kernel
(FASTPETL_BACKEND=cpp, so that nothing is measured). With --launches all is served as on a GPU, in bf16, by Triton's
launchers, whose kernels then do nothing (host_launches.py); with --autocast as well, the model is fp32 and its forward
under torch.autocast in bf16.

Prints the median milliseconds of a forward (inference) and of a training step, eager and patched taking turns, with
adapters and without (bare: nothing but the first bias is trained), and patched over eager. Ratios are what to watch.
"""

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["FASTPETL_BACKEND"] = "auto" if "--launches" in sys.argv else "cpp"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import ViltConfig, ViltForQuestionAnswering

import fastpetl
from fastpetl import models

WIDTH, HEADS = 32, 2
STILL = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
BERT = {**STILL, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": WIDTH, "vocab_size": 60}


def vlbart():
    sides = ("encoder", "decoder")
    sizes = {f"{s}_ffn_dim": WIDTH for s in sides} | {f"{s}_attention_heads": HEADS for s in sides}
    still = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    return models.VLBart(models.VLBartConfig(vocab_size=60, d_model=WIDTH, feat_dim=8, n_boxes=4, **sizes, **still))


def vlt5():
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "num_heads": HEADS, "d_ff": WIDTH, "dropout_rate": 0.0}
    return models.VLT5(models.VLT5Config(vocab_size=60, feat_dim=8, n_boxes=4, **sizes))


def meter():
    sizes = {k: v for k, v in BERT.items() if k != "vocab_size"}
    vision = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": WIDTH, "image_size": 64}
    config = models.MeterConfig(**sizes, num_labels=5, max_text_length=5, text_config=BERT, vision_config=vision)
    return models.MeterForQuestionAnswering(config)


def vilt():
    return ViltForQuestionAnswering(ViltConfig(**BERT, num_labels=5, image_size=32, patch_size=16))


MODELS = {
    "vlbart": (vlbart, fastpetl.AdapterConfig),
    "vlt5": (vlt5, fastpetl.AdapterConfig),
    "meter": (meter, fastpetl.DASConfig),
    "vilt": (vilt, fastpetl.DASConfig),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="which (default: all)")
    parser.add_argument("--seconds", type=float, default=2.5, help="for each model, kind and mode")
    parser.add_argument("--launches", action="store_true", help="served as on a GPU")
    parser.add_argument("--autocast", action="store_true", help="with --launches: fp32 models under autocast")
    args = parser.parse_args()
    if args.autocast and not args.launches:
        parser.error("--autocast is about what serves on a GPU: with --launches")
    torch.set_num_threads(1)
    if args.launches:
        import host_launches

        host_launches.pretend(WIDTH)
    print(f"{'':22}{'forward, ms':>27}{'step, ms':>32}\n{'':22}" + f"{'eager':>9}{'patched':>9}{'ratio':>9}     " * 2)
    for name in args.models or MODELS:
        for kind in ("with adapters", "bare"):
            pair = variants(name, kind == "bare", args.launches, args.autocast)
            around = torch.autocast("cpu", torch.bfloat16) if args.autocast else contextlib.nullcontext()
            cells = [row(pair, run, args.seconds, around) for run in (infer, step)]
            print(f"{name + ', ' + kind:22}" + "     ".join(cells), flush=True)


def variants(name: str, bare: bool, launches: bool = False, autocast: bool = False) -> list:
    """Semantics: [eager, patched], each (model, arguments of a training forward, optimizer)."""
    torch.manual_seed(0)
    build, config = MODELS[name]
    model, inputs = build(), batch(name)
    if bare:
        model.requires_grad_(False)
        next(p for n, p in model.named_parameters() if n.endswith("bias") or name == "vlt5").requires_grad_()
    else:
        fastpetl.attach(model, config(bottleneck=4), patch=False)
    if launches and not autocast:
        model = model.bfloat16()
        inputs = {k: t.bfloat16() if t.is_floating_point() else t for k, t in inputs.items()}
    pair = [model, fastpetl.patch(copy.deepcopy(model), backend="auto" if launches else "torch")]
    trained = ([p for p in m.parameters() if p.requires_grad] for m in pair)
    return [(m, inputs, torch.optim.SGD(ps, 1e-5)) for m, ps in zip(pair, trained, strict=True)]


def batch(name: str) -> dict:
    ids = torch.arange(3, 8).view(1, 5)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("vlbart", "vlt5"):
        return {**text, "vis_feats": torch.randn(1, 4, 8), "labels": ids[:, :3]}
    side = 64 if name == "meter" else 32
    return {**text, "pixel_values": torch.randn(1, 3, side, side), "labels": torch.rand(1, 5)}


def infer(around, model, inputs, optimizer) -> None:
    with torch.no_grad(), around:
        model(**inputs)


def step(around, model, inputs, optimizer) -> None:
    with around:
        loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def row(pair, run, seconds: float, around) -> str:
    """Semantics: median milliseconds of eager and of patched, which take turns, and the second over the first. around:
    the context of forwards.
    """
    for model, *_ in pair:
        model.train(run is step)
    times, end = ([], []), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 8:
        for variant, taken in zip(pair, times, strict=True):
            start = time.perf_counter()
            run(around, *variant)
            taken.append(time.perf_counter() - start)
    eager, patched = (1e3 * statistics.median(taken[3:]) for taken in times)
    return f"{eager:9.2f}{patched:9.2f}{patched / eager:9.2f}"


if __name__ == "__main__":
    main()
