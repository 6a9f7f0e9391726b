"""The workload of `bench vilt`: Hugging Face's ViLT with DAS adapters, its variants, and do they compute the same."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field

import torch

from .timing import Refused

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGITS_LIMIT = 1e-4  # fp32, largest difference / largest logit
GRADIENT_LIMIT = 1e-3  # fp32, relative norm over all trainable parameters
LOSSES_LIMIT = 1e-3


@dataclass(frozen=True)
class Sizes:
    """One workload; the defaults are ViT-B/32's: 40 text tokens + 12 x 20 patches + 1 = 281 tokens."""

    batch: int = 8
    text: int = 40
    image: tuple[int, int] = (384, 640)
    labels: int = 3129
    bottleneck: int = 96
    config: dict = field(default_factory=dict)


TINY = Sizes(
    batch=2,
    text=8,
    image=(32, 48),
    labels=7,
    bottleneck=8,
    config={
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 100,
        "image_size": 32,
        "patch_size": 16,
    },
)


def build(sizes: Sizes, dtype: torch.dtype):
    """Semantics: the attached, unpatched model with random weights from a fixed seed, in eval mode.

    Adapters are random, not zero, biases included. Queries and keys are three times their initial size: at initial size
    attention is all but uniform and hides its errors.
    """
    from transformers import ViltConfig, ViltForQuestionAnswering

    import fastpetl

    torch.manual_seed(0)
    model = ViltForQuestionAnswering(ViltConfig(num_labels=sizes.labels, **sizes.config))
    fastpetl.attach(model, fastpetl.DASConfig(bottleneck=sizes.bottleneck), patch=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapter" in name and p.dim() == 1 and "norm" not in name:
                p.normal_(std=0.02)
            elif name.endswith(("query.weight", "key.weight")):
                p.mul_(3)
    return model.to(dtype).eval()


def inputs(sizes: Sizes, dtype: torch.dtype, vocabulary: int, seed: int = 1) -> tuple[dict, torch.Tensor]:
    """Semantics: (arguments of the model's forward, soft labels)."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(0, vocabulary, (sizes.batch, sizes.text), generator=generator),
        "attention_mask": torch.ones(sizes.batch, sizes.text, dtype=torch.long),
        "pixel_values": torch.randn(sizes.batch, 3, *sizes.image, generator=generator).to(dtype),
    }
    return batch, torch.rand(sizes.batch, sizes.labels, generator=generator).to(dtype)


# --- eager, with every fp32 GEMM sent to oneDNN -------------------------------------------------------------------


@contextlib.contextmanager
def route():
    """torch sends fp32 matrix products to oneDNN, forward and backward, when they may be computed in bf16. oneDNN does
    that only where AMX makes it faster; without AMX, or with ONEDNN_MAX_CPU_ISA=AVX512_CORE, it computes in fp32.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def route_reason() -> str | None:
    """Semantics: why `route` cannot serve as a true-fp32 baseline in this process; None if it can. Measured."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, 768, generator=generator), torch.randn(768, 512, generator=generator)
    want = a.double() @ b.double()
    plain = ((a @ b) - want).norm() / want.norm()
    with route():
        routed = ((a @ b) - want).norm() / want.norm()
    if routed <= 8 * plain:
        return None
    return f"would compute in bf16 (relative error {routed:.0e}, torch's fp32 has {plain:.0e})"


# --- variants -------------------------------------------------------------------------------------------------------


class Variant:
    """One way to run the model: its own weights (it takes `model` as its own), its own optimizer, one batch."""

    def __init__(self, name: str, model, batch: dict, labels: torch.Tensor):
        import fastpetl

        self.name, self.batch, self.labels = name, batch, labels
        self.model = model
        self._context = route if name == "routed" else contextlib.nullcontext
        if name == "compile":
            # Not the whole model: ViLT's visual embedding has data-dependent shapes, which break the graph anyway.
            self.model.vilt.encoder.compile()
        elif name == "patched":
            fastpetl.patch(self.model)
        self._optimizer = None

    def forward(self, labels=None, batch=None):
        torch.manual_seed(1)  # ViLT shuffles the image patches with the global generator, in eval mode as well
        return self.model(**(batch or self.batch), labels=labels)

    @torch.no_grad()
    def infer(self) -> torch.Tensor:
        """Semantics: the logits, no gradient recorded."""
        self.model.eval()
        with self._context():
            return self.forward().logits

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Semantics: (logits, all trainable parameters' gradients end to end), of the training forward."""
        self.model.train().zero_grad(set_to_none=True)
        with self._context():
            out = self.forward(self.labels)
            out.loss.backward()
        flat = torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return out.logits.detach(), flat

    def step(self, batch=None, labels=None) -> torch.Tensor:
        """Semantics: one training step (AdamW, binary cross entropy); returns the loss."""
        if self._optimizer is None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        with self._context():
            loss = self.forward(self.labels if labels is None else labels, batch).loss
            loss.backward()
        self._optimizer.step()
        return loss.detach()


def make(name: str, sizes: Sizes, dtype: str):
    """Semantics: one variant from scratch, equal to the others of the same sizes and dtype."""
    base = build(sizes, DTYPES[dtype])
    return Variant(name, base, *inputs(sizes, DTYPES[dtype], base.config.vocab_size))


# --- do they compute the same? ----------------------------------------------------------------------------------------


def largest(got: torch.Tensor, want: torch.Tensor) -> float:
    """Semantics: largest difference over largest value, in float64; infinite if anything is not finite."""
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
    return error if error == error else float("inf")


def norm(got: torch.Tensor, want: torch.Tensor) -> float:
    """Semantics: relative Frobenius norm of the difference; infinite if anything is not finite."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return error if error == error else float("inf")


def verify(variants: dict[str, Variant], dtype: str, mode: str, truth: Variant) -> list[dict]:
    """Semantics: one check per variant and quantity, before anything is timed; raises Refused if one fails.

    fp32: against eager, with fixed limits. bf16: each variant's error against the fp32 model of the same weights
    (`truth`), which may be twice eager's. Inference: logits. Training: logits and gradients.
    """
    want = _results(truth, mode)
    noise = {} if dtype == "fp32" else {k: _METRIC[k](v, want[k]) for k, v in _results(variants["eager"], mode).items()}
    checks = []
    for name, variant in variants.items():
        if variant is truth or (name == "eager" and dtype != "fp32"):
            continue
        for quantity, value in _results(variant, mode).items():
            error = _METRIC[quantity](value, want[quantity])
            limit = _LIMIT[quantity] if dtype == "fp32" else 2 * noise[quantity] + 1e-3
            checks.append(
                {
                    "dtype": dtype,
                    "mode": mode,
                    "variant": name,
                    "what": quantity,
                    "against": "eager" if dtype == "fp32" else "fp32 eager",
                    "error": error,
                    "limit": limit,
                    "eager_error": noise.get(quantity),
                    "met": error <= limit,
                }
            )
    wrong = [check for check in checks if not check["met"]]
    if wrong:
        c = wrong[0]
        raise Refused(
            f"bench: {c['variant']} ({dtype}, {mode}): {c['what']} differ from {c['against']}'s by {c['error']:.1e}, "
            f"expected at most {c['limit']:.1e}; nothing was timed"
        )
    return checks


_METRIC = {"logits": largest, "gradients": norm}
_LIMIT = {"logits": LOGITS_LIMIT, "gradients": GRADIENT_LIMIT}


def _results(variant: Variant, mode: str) -> dict[str, torch.Tensor]:
    if mode == "inference":
        return {"logits": variant.infer()}
    logits, grads = variant.gradients()
    return {"logits": logits, "gradients": grads}


def losses(sizes: Sizes, steps: int, progress) -> dict:
    """Semantics: fp32 training losses of eager and patched over `steps` steps, four batches in turn, and their largest
    relative difference.
    """
    base = build(sizes, torch.float32)
    batches = [inputs(sizes, torch.float32, base.config.vocab_size, seed) for seed in range(4)]
    variants = {name: Variant(name, copy.deepcopy(base), *batches[0]) for name in ("eager", "patched")}
    found = {name: [] for name in variants}
    for i in range(steps):
        for name, variant in variants.items():
            found[name].append(variant.step(*batches[i % len(batches)]).item())
            progress(name)
    difference = max(abs(p - e) / abs(e) for e, p in zip(found["eager"], found["patched"], strict=True))
    return {"steps": steps, "difference": difference, "limit": LOSSES_LIMIT, "met": difference <= LOSSES_LIMIT, **found}
