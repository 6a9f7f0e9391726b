"""One way to run a benchmark's model (eager, compiled, routed, patched), and do the ways compute the same?"""

from __future__ import annotations

import contextlib
import copy
import functools

import torch

from .timing import Refused
from .workloads import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = {**DTYPES, "autocast": torch.float32}  # the dtype of the model
LOGITS_LIMIT = 1e-4  # fp32, largest difference / largest logit
GRADIENT_LIMIT = 1e-3  # fp32, relative norm over all trainable parameters
LOSSES_LIMIT = 1e-3
BASELINES = ("compile", "routed")  # not ours: one that computes something else is not timed, and the rest goes on


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
    """One way to run the model: its own weights (it takes `model` as its own), its own optimizer, one batch. autocast:
    forwards run under torch.autocast in bf16.
    """

    def __init__(self, name: str, work: Workload, model, batch: dict, autocast: bool = False):
        import fastpetl

        self.name, self.work, self.batch, self.model = name, work, batch, model
        self._context = route if name == "routed" else contextlib.nullcontext
        self._autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
        if name == "compile":
            work.compile(self.model)
        elif name == "patched":
            fastpetl.patch(self.model)
        self._optimizer = None

    def forward(self, batch: dict):
        torch.manual_seed(1)  # ViLT shuffles the image patches with the global generator, in eval mode as well
        with self._autocast():
            return self.model(**batch)

    @torch.no_grad()
    def infer(self) -> torch.Tensor:
        """Semantics: the logits, no gradient recorded."""
        self.model.eval()
        with self._context():
            return self.forward(self.work.for_inference(self.batch)).logits

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Semantics: (logits, all trainable parameters' gradients end to end), of the training forward."""
        self.model.train().zero_grad(set_to_none=True)
        with self._context():
            out = self.forward(self.batch)
            out.loss.backward()
        flat = torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return out.logits.detach(), flat

    def step(self, batch: dict | None = None) -> torch.Tensor:
        """Semantics: one training step (AdamW, the model's own loss); returns the loss."""
        if self._optimizer is None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        with self._context():
            loss = self.forward(self.batch if batch is None else batch).loss
            loss.backward()
        self._optimizer.step()
        return loss.detach()


def make(name: str, work: Workload, tiny: bool, dtype: str, **sizes) -> Variant:
    """Semantics: one variant from scratch, equal to the others of the same workload and dtype."""
    base = work.build(tiny).to(PRECISIONS[dtype])
    return Variant(name, work, base, work.batch(base, tiny, PRECISIONS[dtype], **sizes), dtype == "autocast")


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
    """Semantics: one check per variant and quantity, before anything is timed; raises Refused if patched, or bf16's
    eager, fails one. Another variant that does is a baseline the caller must leave out.

    fp32: against eager, with fixed limits; a variant over one of them must be at most twice as far from the float64
    model as eager is (a model can magnify fp32's rounding). bf16, autocast: each variant's error against
    the fp32 model of the same weights (`truth`), which may be twice eager's. Inference: logits. Training: also the
    gradients.
    """
    want = _results(truth, mode)
    noise = {} if dtype == "fp32" else {k: _METRIC[k](v, want[k]) for k, v in _results(variants["eager"], mode).items()}
    checks, exact = [], None
    for name, variant in variants.items():
        if variant is truth or (name == "eager" and dtype != "fp32"):
            continue
        for quantity, value in _results(variant, mode).items():
            error = _METRIC[quantity](value, want[quantity])
            limit = _LIMIT[quantity] if dtype == "fp32" else 2 * noise[quantity] + 1e-3
            if dtype == "fp32" and error > limit and name not in BASELINES:
                exact = exact or _results(_double(truth), mode)
                metric, against = _METRIC[quantity], "float64"
                error, noise[quantity] = metric(value, exact[quantity]), metric(want[quantity], exact[quantity])
                limit = 2 * noise[quantity]
            else:
                against = "eager" if dtype == "fp32" else "fp32 eager"
            checks.append(
                {
                    "dtype": dtype,
                    "mode": mode,
                    "variant": name,
                    "what": quantity,
                    "against": against,
                    "error": error,
                    "limit": limit,
                    "eager_error": noise.get(quantity),
                    "met": error <= limit,
                }
            )
    wrong = [check for check in checks if not check["met"] and check["variant"] not in BASELINES]
    if wrong:
        raise Refused(f"bench: {wrong[0]['variant']} ({dtype}, {mode}): {difference(wrong[0])}; nothing was timed")
    return checks


def difference(check: dict) -> str:
    """Semantics: a failed check in words."""
    error, limit = f"{check['error']:.1e}", f"{check['limit']:.1e}"
    return f"{check['what']} differ from {check['against']}'s by {error}, expected at most {limit}"


def _double(truth: Variant) -> Variant:
    batch = {name: t.double() if t.is_floating_point() else t for name, t in truth.batch.items()}
    return Variant("eager", truth.work, copy.deepcopy(truth.model).double(), batch)


_METRIC = {"logits": largest, "gradients": norm}
_LIMIT = {"logits": LOGITS_LIMIT, "gradients": GRADIENT_LIMIT}


def _results(variant: Variant, mode: str) -> dict[str, torch.Tensor]:
    if mode == "inference":
        return {"logits": variant.infer()}
    logits, grads = variant.gradients()
    return {"logits": logits, "gradients": grads}


def losses(work: Workload, tiny: bool, steps: int, progress) -> dict:
    """Semantics: fp32 training losses of eager and patched over `steps` steps, four batches in turn, and their largest
    relative difference.
    """
    base = work.build(tiny)
    batches = [work.batch(base, tiny, torch.float32, seed) for seed in range(4)]
    variants = {name: Variant(name, work, copy.deepcopy(base), batches[0]) for name in ("eager", "patched")}
    found = {name: [] for name in variants}
    for i in range(steps):
        for name, variant in variants.items():
            found[name].append(variant.step(batches[i % len(batches)]).item())
            progress(name)
    difference = max(abs(p - e) / abs(e) for e, p in zip(found["eager"], found["patched"], strict=True))
    return {"steps": steps, "difference": difference, "limit": LOSSES_LIMIT, "met": difference <= LOSSES_LIMIT, **found}
