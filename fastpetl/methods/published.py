"""What VL-Adapter (CVPR 2022, table 1) says each method trains on VL-BART, beside what is counted here."""

from __future__ import annotations

import torch

# method, sharing -> trained, in percent of all parameters; what is not here has no row that could be read
PAPER = {
    ("baseline", "all"): 100.0,
    ("adapter", "multiple"): 12.22,
    ("adapter", "half"): 8.36,
    ("adapter", "single"): 4.18,
    ("hyperformer", "single"): 5.79,
    ("compacter", "single"): 2.70,
    ("lora", "multiple"): 17.72,
    ("lora", "single"): 5.93,
    ("prompt", "single"): 2.00,
    ("baseline", "visual"): 1.14,
    ("baseline", "norms"): 1.18,
    ("video adapter", "single"): 3.39,
    ("video lora", "single"): 5.17,
}
VIDEO = ("adapter", "lora", "prompt")  # the paper's on video and text, single, with CLIP's 512 channels a frame
_MORE = {
    # half of the adapter shared as the paper does not; task-specific prompts in front of the single adapters' text
    "adapter": [
        ("half-down", {"sharing": "half", "shared": "down"}),
        ("prompts", {"prompts": {"sharing": "multiple"}}),
    ],
    # Compacter's own settings (NeurIPS 2021), which VL-Adapter's tables do not use
    "compacter": [("recipe", {"division": 4, "reduction_factor": 16, "rank": 1, "shared_rule": True})],
}
METHODS = ("adapter", "compacter", "lowrank", "hyperformer", "lora", "prompt", "baseline")


def table(model: str, methods=METHODS) -> str:
    """Semantics: rows (method, sharing, total, trainable, %, the paper's %) for "vlbart" or "vlt5" at the paper's
    sizes; nothing is allocated.
    """
    from fastpetl import methods as m
    from fastpetl import models
    from fastpetl.count import count

    kinds = {cls.method: cls for cls in m.CONFIGS}
    model_class, config_class = {
        "vlbart": (models.VLBart, models.VLBartConfig),
        "vlt5": (models.VLT5, models.VLT5Config),
    }[model]
    lines = [("method", "sharing", "parameters", "trainable", "%", "paper %")]
    rows = [(name, sharing, options, {}) for name in methods for sharing, options in _variants(name)]
    if model == "vlbart":
        rows += [(f"video {name}", "single", {}, {"feat_dim": 512, "n_boxes": 64}) for name in methods if name in VIDEO]
    for name, sharing, options, sizes in rows:
        config = kinds[name.removeprefix("video ")](**options)
        with torch.device("meta"):
            found = count(m.attach(model_class(config_class(**sizes)), config, patch=False))
        paper = PAPER.get((name, sharing)) if model == "vlbart" else None
        share, theirs = f"{found.trainable_percent:.2f}", "-" if paper is None else f"{paper:.2f}"
        lines.append((name, sharing, f"{found.total:,}", f"{found.trainable:,}", share, theirs))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _variants(name: str):
    """(what the row is called, the configuration's arguments)."""
    if name == "baseline":
        return [(train, {"train": train}) for train in ("all", "visual", "norms", "biases")]
    if name == "hyperformer":
        return [("single", {}), ("unified", {"unified": True})]
    sharings = ("single", "multiple") if name in ("lora", "prompt") else ("single", "half", "multiple")
    return [(sharing, {"sharing": sharing}) for sharing in sharings] + _MORE.get(name, [])
