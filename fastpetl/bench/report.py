"""The tables of the benchmarks, as text."""

from __future__ import annotations


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Semantics: left-aligned first columns of words, right-aligned numbers, two blanks between."""
    cells = [headings, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    numeric = [all(row[i][:1] in "-0123456789~" for row in rows) for i in range(len(headings))]
    lines = []
    for row in cells:
        pads = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(pads).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def machine(facts: dict) -> str:
    """Semantics: the machine facts of one measuring process, a line each."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [
        f"CPU       {facts['cpu']}: {' '.join(facts['flags'])}; fastpetl {facts['fastpetl']} runs {facts['isa']}",
        f"software  {versions}",
        f"threads   {facts['threads']}, {facts['pinned']}; malloc {facts['malloc']}",
    ]
    for dtype, rates in facts["gflops"].items():
        best = sorted(rates.items(), key=lambda item: -item[1])
        text = "; ".join(f"{name} {rate:.0f}" for name, rate in best)
        lines.append(f"GEMM      {dtype}, GFLOP/s reached (not an FMA peak): {text}")
    return "\n".join(lines)


def milliseconds(row: dict) -> str:
    """Semantics: the median, marked ~ where samples had to be used during which other processes ran."""
    return ("~" if row["loaded"] else "") + (f"{row['ms']:.0f}" if row["ms"] >= 100 else f"{row['ms']:.2f}")


def bar(ratio: dict | None) -> str:
    """Semantics: a ratio with its bar: "2.31 (>= 2.1: met)"."""
    if ratio is None:
        return "-"
    text = f"{ratio['ratio']:.2f}"
    if ratio["bar"] is None:
        return text
    return f"{text} (>= {ratio['bar']}: {'met' if ratio['met'] else 'MISSED'})"


def models(result: dict) -> str:
    """Semantics: times, ratios, checks and memory of `bench vilt`, and of `bench adapterhub` what the other side is."""
    rows, base = [], {}
    for row in result["rows"]:
        if row["status"] == "ok":
            base[row["model"], row["dtype"], row["mode"], row["variant"]] = row["ms"]
    baselines = ("eager", "adapterhub") if "adapterhub" in result else ("eager", "compile", "routed")
    for row in result["rows"]:
        head = [row["model"], row["dtype"], row["mode"], row["variant"]]
        if row["status"] != "ok":
            rows.append([*head, "-", "-", *("-" for _ in baselines), f"not available: {row['status']}"])
            continue
        over = [base.get((*head[:3], name)) for name in baselines]
        over = ["-" if ms is None else f"{ms / row['ms']:.2f}" for ms in over]
        note = f"{len(row['samples'])} samples, {row['thrown_away']} thrown away"
        rows.append([*head, milliseconds(row), f"{100 * row['spread']:.0f} %", *over, note])
    columns = ["model", "dtype", "mode", "variant", "ms", "spread", *(f"{name}/x" for name in baselines), "note"]
    parts = [*_there(result), table(columns, rows)] if rows else []
    if result["ratios"]:
        lines = [[r["model"], r["dtype"], r["mode"], r["against"], bar(r)] for r in result["ratios"]]
        parts.append(table(["model", "dtype", "mode", "patched against", "ratio of medians"], lines))
    if result["checks"]:
        lines = []
        for c in result["checks"]:
            own = "" if c["eager_error"] is None else f", eager {c['eager_error']:.1e}"
            what = f"{c['what']} against {c['against']}"
            lines.append(
                [
                    c["model"],
                    c["dtype"],
                    c["mode"],
                    c["variant"],
                    what,
                    f"{c['error']:.1e}",
                    f"<= {c['limit']:.1e}{own}",
                ]
            )
        parts.append(table(["model", "dtype", "mode", "variant", "checked before timing", "error", "allowed"], lines))
    parts += _memory(result) + _losses(result) + _chosen(result)
    return "\n\n".join(parts)


def _there(result: dict) -> list[str]:
    found = result.get("adapterhub")
    if not found:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        f"adapterhub, bare_there: in a process with {versions}; {found['pinned']}; asking it takes "
        f"{found['round_trip_ms']:.2f} ms"
    ]


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.{0 if value >= 100 else 1}f}"


def _memory(result: dict) -> list[str]:
    keys = ("saved_mib", "step_peak_mib", "process_peak_mib")
    lines = [[m["model"], m["dtype"], m["variant"], *(_mib(m[key]) for key in keys)] for m in result["memory"]]
    columns = ["model", "dtype", "variant", "saved for backward, MiB", "peak RSS of a step, MiB", "of the process, MiB"]
    return [table(columns, lines)] if lines else []


def _losses(result: dict) -> list[str]:
    found = result.get("losses")
    if not found:
        return []
    ends = f"eager {found['eager'][0]:.3f} -> {found['eager'][-1]:.3f}"
    met = "met" if found["met"] else "MISSED"
    return [
        f"{found['steps']} training steps, fp32: largest relative difference of the losses "
        f"{found['difference']:.1e} (<= {found['limit']:.0e}: {met}); {ends}"
    ]


def _chosen(result: dict) -> list[str]:
    lines = []
    for t in result["tuned"]:
        ms = ", ".join(f"{name} {value:.2f}" for name, value in sorted(t["ms"].items(), key=lambda item: item[1]))
        lines.append(
            [" ".join(t["key"]), t["chosen"], "; ".join([ms, *(f"{n} {r}" for n, r in t["rejected"].items())])]
        )
    return [table(["backends measured by patch: shape class", "chosen", "ms"], lines)] if lines else []


def skip(result: dict) -> str:
    """Semantics: times of `bench skip` or `bench tasks`, and what they were measured for."""
    rows = [
        [r["model"], r["mode"], r["variant"], milliseconds(r), f"{100 * r['spread']:.0f} %"] for r in result["rows"]
    ]
    parts = [table(["model", "mode", "setting", "ms", "spread"], rows)]
    lines = []
    for r in result["ratios"]:
        met = "-" if r["bar"] is None else f"{r['bar']:g}: {'met' if r['met'] else 'MISSED'}"
        lines.append([r["model"], r["mode"], r["setting"], f"{r['value']:.3f}", met, r["what"]])
    return "\n\n".join([*parts, table(["model", "mode", "setting", "value", "bar", "what"], lines)] if lines else parts)


def ops(result: dict) -> str:
    """Semantics: times, rates and ratios of `bench ops`."""
    found = {}
    for r in result["ratios"]:
        found[r["dtype"], r["case"], r["mode"], r["variant"], r["against"]] = r
    lines, losing = [], []
    for row in result["rows"]:
        key = (row["dtype"], row["case"], row["mode"], row["variant"])
        against = [found.get((*key, base)) for base in ("eager", "compile", "routed")]
        losing += [f"{' '.join(key)} against {r['against']}: {r['ratio']:.2f}" for r in against if r and r["ratio"] < 1]
        rates = [f"{row['gflops']:.0f}", f"{row['floor_mib']:.1f}", f"{row['floor_gbs']:.1f}"]
        lines.append([*key, milliseconds(row), f"{100 * row['spread']:.0f} %", *rates, *map(bar, against)])
    columns = ["dtype", "case", "mode", "variant", "ms", "spread", "GFLOP/s", "floor MiB", "GB/s of floor"]
    columns += ["eager/x", "compile/x", "routed/x"]
    peak = "" if result["fma_gflops"] is None else f"; FMA chains reach {result['fma_gflops']:.0f} GFLOP/s"
    copy = f"a copy of 256 MiB runs at {result['copy_gbs']:.1f} GB/s here"
    note = f"floor: the bytes a perfect kernel moves; {copy}{peak}"
    unrouted = [c["case"] for c in result["checks"] if not c["met"]]
    if unrouted:
        note += "\nrouted is not true fp32 here and left out: " + "; ".join(unrouted)
    slower = ["slower than a baseline: " + ("; ".join(losing) if losing else "none")]
    return "\n".join([table(columns, lines), note, *slower])
