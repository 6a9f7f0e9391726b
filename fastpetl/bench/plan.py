"""Names the benchmarks share, and which part of them was asked for. Imports nothing: read before torch may load."""

from __future__ import annotations

DTYPES = ("fp32", "bf16")
PRECISIONS = (*DTYPES, "autocast")  # of models: an fp32 model under torch.autocast in bf16
MODES = ("inference", "train")
MODELS = {  # the workloads of each command
    "vilt": ("vilt",),
    "models": ("meter", "vlbart", "vlt5"),
    "methods": ("vlbart", "vlbart_compacter", "vlbart_hyperformer", "vlbart_lora"),
}
SKIP = {  # the models of `bench skip`: (settings beside "nothing skipped", by mode)
    "vilt": {mode: ("static", "masks", "keep-all masks") for mode in MODES},
    # METER's own headline is against the model without adapters; trained, that would be another model
    "meter": {"inference": ("static", "no adapters"), "train": ("static",)},
}
VARIANTS = ("eager", "compile", "routed", "patched")
MEMORY_VARIANTS = ("eager", "patched")
HUB_MODELS = ("t5", "bart")  # of `bench adapterhub`
HUB_VARIANTS = ("eager", "patched", "adapterhub", "bare", "bare_there")
LOSSES = "vilt"  # the model whose losses --losses compares


def wants(only: tuple[str, ...], *path: str) -> bool:
    """Semantics: is any of `only` a part of the path's parts joined by "/"? Everything is wanted if `only` is empty."""
    return not only or any(part in "/".join(path) for part in only)


def with_eager(names: list[str]) -> list[str]:
    """Semantics: the names, eager first among them: it is the base of every ratio. Nothing stays nothing."""
    return ["eager", *(name for name in names if name != "eager")] if names else []


def model_variants(only: tuple[str, ...], model: str, dtype: str, mode: str) -> list[str]:
    """Semantics: the variants of a model's benchmark to be timed. Routing concerns fp32 alone."""
    names = [name for name in VARIANTS if wants(only, model, dtype, mode, name)]
    return with_eager([name for name in names if dtype == "fp32" or name != "routed"])


def hub_modes(only: tuple[str, ...], model: str) -> list[str]:
    """Semantics: the modes to be timed of a model of `bench adapterhub`, always in all variants."""
    return [mode for mode in MODES if any(wants(only, model, "fp32", mode, name) for name in HUB_VARIANTS)]


def model_jobs(models: tuple[str, ...], only: tuple[str, ...], losses: bool) -> list[dict]:
    """Semantics: the processes `bench vilt` or `bench models` consists of."""
    jobs = []
    for model in models:
        for dtype in PRECISIONS:
            if any(model_variants(only, model, dtype, mode) for mode in MODES):
                jobs.append({"kind": "time", "model": model, "dtype": dtype})
        for dtype in PRECISIONS:
            names = [name for name in MEMORY_VARIANTS if wants(only, model, dtype, "memory", name)]
            jobs += [{"kind": "memory", "model": model, "dtype": dtype, "variant": name} for name in names]
    return [*jobs, {"kind": "losses", "model": LOSSES, "dtype": "fp32"}] if losses else jobs


def skip_settings(only: tuple[str, ...], model: str, mode: str) -> list[str]:
    """Semantics: the settings of `bench skip` to be timed, "nothing skipped", the base of all, first among them."""
    names = [name for name in SKIP[model][mode] if wants(only, model, mode, name)]
    if names == ["no adapters"]:  # against which the plan is held
        names = ["static", *names]
    return ["nothing skipped", *names] if names else []


def skip_passes(only: tuple[str, ...], model: str) -> list[str]:
    """Semantics: the two ways to score candidates, if they are to be timed."""
    return ["three passes", "one pass"] if wants(only, model, "scoring", "one pass") else []


def skip_jobs(only: tuple[str, ...]) -> list[dict]:
    """Semantics: the processes `bench skip` consists of."""
    wanted = [m for m in SKIP if skip_passes(only, m) or any(skip_settings(only, m, mode) for mode in MODES)]
    return [{"kind": "time", "model": model, "dtype": "fp32"} for model in wanted]
