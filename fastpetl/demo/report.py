"""What the demo shows: a table, the checks it must pass, and two plots."""

from __future__ import annotations

from pathlib import Path

from .model import TITLES

MIN_FULL_ACCURACY = 0.90
MIN_ADAPTER_SHARE = 0.95
MAX_DELTA_LOGIT = 1e-4  # relative to the largest logit
MAX_DELTA_LOSS = 1e-3  # relative, over the first 50 steps
COMPARED_STEPS = 50


def loss_difference(runs: dict[str, dict]) -> float:
    """Largest relative difference between the patched and the unpatched run's losses over the first 50 steps."""
    pairs = zip(runs["adapters"]["losses"][:COMPARED_STEPS], runs["patched"]["losses"][:COMPARED_STEPS], strict=True)
    return max(abs(ours - plain) / abs(plain) for plain, ours in pairs)


def _check(name: str, got: float, expected: float, at_least: bool) -> dict:
    passed = got >= expected if at_least else got <= expected
    return {"name": name, "got": got, "expected": expected, "at_least": at_least, "passed": passed}


def checks(runs: dict[str, dict], comparison: dict, *, accuracy: bool) -> list[dict]:
    """What must hold; ``accuracy=False`` leaves out the accuracies (a quick run trains too little for them)."""
    found = [
        _check(f"|delta logit| of {variant}, relative", delta["relative"], MAX_DELTA_LOGIT, False)
        for variant, delta in comparison["delta_logits"].items()
    ]
    found.append(
        _check("|delta loss| of patched over 50 steps, relative", loss_difference(runs), MAX_DELTA_LOSS, False)
    )
    if accuracy:
        full = runs["full"]["accuracy"]
        found.append(_check("test accuracy of full fine-tuning", full, MIN_FULL_ACCURACY, True))
        for variant in ("adapters", "patched"):
            name = f"test accuracy of {variant}, share of full fine-tuning's"
            found.append(_check(name, runs[variant]["accuracy"] / full, MIN_ADAPTER_SHARE, True))
    return found


def _row(run: dict, comparison: dict) -> list[str]:
    variant = run["variant"]
    delta = comparison["delta_logits"].get(variant)
    return [
        TITLES[variant],
        f"{100 * run['accuracy']:.1f} %",
        f"{100 * run['trainable_parameters'] / run['total_parameters']:.1f} %",
        f"{run['macs_per_sample'] / 1e6:.1f} M",
        f"{run['seconds_per_step']:.3f}",
        f"{run['samples_per_second']:.0f}",
        f"{run['peak_memory_mib']:.0f}",
        f"{comparison['speedup_over_unpatched'][variant]:.2f}x",
        f"{delta['max_abs']:.1e}" if delta else "-",
    ]


def table(runs: dict[str, dict], comparison: dict) -> str:
    """The result as text."""
    head = ["run", "test acc.", "trainable", "MACs", "s/step", "samples/s", "peak MiB", "speed-up", "|d logit|"]
    rows = [head, *(_row(run, comparison) for run in runs.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    notes = [
        "s/step, samples/s: median of the run's training steps.  peak MiB: highest resident memory of the run's",
        "own process above what it held before the model was made.  speed-up: over unpatched DAS adapters,",
        "training steps taken in turns in one process, ratio of medians.  |d logit|: largest difference from the",
        "unpatched model with the same weights, inputs and skipped blocks.",
    ]
    return "\n".join([*lines, "", *notes])


def check_lines(found: list[dict]) -> str:
    """One line per check."""
    return "\n".join(
        f"{'ok    ' if c['passed'] else 'FAILED'} {c['name']}: {c['got']:.4g}"
        f" (must be {'at least' if c['at_least'] else 'at most'} {c['expected']:g})"
        for c in found
    )


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean without start-up bias."""
    mean, total, out = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


def plot_losses(runs: dict[str, dict], path: Path) -> None:
    """Training losses, smoothed, over one another; the patched run is dashed because it lies on the unpatched one."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    styles = {
        "full": ("C7", "-", 1.5),
        "adapters": ("C0", "-", 4.0),
        "patched": ("C1", "--", 1.5),
        "skipped": ("C2", "-", 1.5),
    }
    for variant, run in runs.items():
        colour, line, width = styles[variant]
        axes.plot(_smooth(run["losses"]), color=colour, linestyle=line, linewidth=width, label=TITLES[variant])
    axes.set(
        xlabel="training step",
        ylabel="loss (running mean)",
        title="easy-VQA, open questions: training loss",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_costs(runs: dict[str, dict], comparison: dict, path: Path) -> None:
    """Seconds per step (taken in turns) and peak memory, a bar per run."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    labels = [
        TITLES[v].replace(", ", ",\n").replace("full fine", "full\nfine").replace("DAS adapters", "DAS") for v in runs
    ]
    colours = ["C7", "C0", "C1", "C2"]
    panels = [
        (
            left,
            [1e3 * comparison["seconds_per_step"][v] for v in runs],
            "training step, ms (lower is better)",
            "{:.0f}",
        ),
        (right, [run["peak_memory_mib"] for run in runs.values()], "peak memory, MiB (lower is better)", "{:.0f}"),
    ]
    for axes, values, title, fmt in panels:
        axes.bar_label(axes.bar(labels, values, color=colours), labels=[fmt.format(v) for v in values], padding=2)
        axes.set_title(title)
        axes.margins(y=0.12)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
