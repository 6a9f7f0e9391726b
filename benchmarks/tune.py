"""Measures on this GPU which backend is fastest at which size and writes that into fastpetl/tuned.json: data that
backend="auto" looks up (fastpetl/_tuned.py). Entries of other architectures stay.

    python benchmarks/tune.py [--minutes 4] [--dtypes bf16,fp16,fp32] [--dry]

Times forward and backward apart, by CUDA events, the median of triton.testing.do_bench; each backend is first
compared with float64, and one that is wrong, or fails, is never an entry. Another backend than the one "auto" takes
without a table must be 3 % faster. --dry prints the table. Without a GPU it says so, exits with 0 and writes nothing.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpu_measure  # noqa: E402
import gpu_stages as stages  # noqa: E402

WIDTHS = (64, 128, 256, 512)  # bottlenecks, each the class of those down to half of it
ROWS = (256, 2048, 16384, 65536)
MARGIN = 1.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="stop measuring after this long; what is there counts"
    )
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--dry", action="store_true", help="print the table instead of writing it")
    args = parser.parse_args()
    if not stages.gpu():
        print("tune: there is no CUDA device: nothing is measured, fastpetl/tuned.json stays as it is")
        return 0
    import torch

    from fastpetl import _tuned

    found = measure(args.dtypes.split(","), time.time() + 60 * args.minutes)
    major, minor = torch.cuda.get_device_capability()
    table = merged(_tuned.table(), f"sm_{major}{minor}", found)
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    if args.dry:
        print(text)
    else:
        _tuned.PATH.write_text(text)
        print(f"written: {_tuned.PATH}")
    return 0


def measure(shorts, end: float) -> dict:
    """Semantics: {op: {dtype: {width class: {rows class: backend}}}} of this GPU, as far as the time went."""
    from fastpetl.bench import cases

    found = {}
    for short in shorts:
        for width in WIDTHS:
            for rows in ROWS:
                for op, builder in (("adapter", cases.adapter_of), ("site", cases.site_of)):
                    if time.time() > end:
                        print("tune: out of time")
                        return found
                    dtype = stages.dtypes()[short]
                    for way, times in one(op, builder(width * 3 // 4), rows, dtype).items():
                        print(
                            op + way,
                            short,
                            f"r {width}, rows {rows}:",
                            {n: f"{1e6 * t:.1f} us" for n, t in times.items()},
                        )
                        if times:
                            by_dtype = found.setdefault(op + way, {}).setdefault(str(dtype).removeprefix("torch."), {})
                            by_dtype.setdefault(str(width), {})[str(rows)] = best(op, dtype, times)
    return found


def one(op, build, rows, dtype) -> dict:
    """Semantics: {"": forward, "_backward": backward}, each {backend that serves and is right: seconds}, at ViT-B's
    width."""
    from fastpetl import backends
    from fastpetl.bench import cases
    from fastpetl.bench import ops as bench

    device = "cuda" if stages.gpu() else "cpu"
    names = [n for n in backends.BACKENDS[op] if n != "reference" and backends.verify(op, n, device, dtype)[0]]
    small = build(cases.Size(rows=min(rows, 1100)), cases.Maker(dtype, device, seed=3))
    made, times = build(cases.Size(rows=rows), cases.Maker(dtype, device, seed=3)), {"": {}, "_backward": {}}
    small_grads = bench.cotangents(small)
    for name in names:
        try:
            bench.verify(small, {"eager": small.formula, name: small.fused(name)}, small_grads, op)
            times[""][name] = gpu_measure.seconds(functools.partial(made.fused(name), *made.inputs))
            times["_backward"][name] = gpu_measure.seconds(backward(made, name))
        except (RuntimeError, ValueError) as error:
            print(f"tune: {op} by {name} is left out: {str(error)[:200]}")
    return times


def backward(made, name):
    """Semantics: a call that computes all gradients again, of a forward that has been run once."""
    import torch

    outs = made.fused(name)(*made.inputs)
    outs = [t for t in (outs if isinstance(outs, tuple) else (outs,)) if t is not None]
    grads = [torch.randn_like(t) for t in outs]
    return functools.partial(torch.autograd.grad, outs, made.inputs, grads, retain_graph=True)


def best(op, dtype, times: dict) -> str:
    """Semantics: the fastest of `times`, or the one taken without a table unless that is slower by more than noise."""
    from fastpetl import backends

    fastest = min(times, key=times.get)
    usual = backends.candidates(op, "cuda", dtype)[0]
    return usual if usual in times and times[usual] <= MARGIN * times[fastest] else fastest


def merged(table: dict, architecture: str, found: dict) -> dict:
    """Semantics: `table` with this architecture's new entries; what was not measured this time stays."""
    table = json.loads(json.dumps(table))
    for op, dtypes in found.items():
        for dtype, widths in dtypes.items():
            for width, by_rows in widths.items():
                here = table.setdefault(architecture, {}).setdefault(op, {}).setdefault(dtype, {})
                here.setdefault(width, {}).update(by_rows)
    return table


if __name__ == "__main__":
    sys.exit(main())
