"""Where the memory that a training step keeps for its backward goes: python benchmarks/saved.py vlbart --batch 2

One line per place in the code, shape and dtype, largest first; each storage once, under whoever kept it first; no
parameters and inputs. FASTPETL_TUNE=0 takes each op's first backend instead of this machine's choice.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastpetl.bench import variant as vm  # noqa: E402
from fastpetl.bench.workloads import WORKLOADS  # noqa: E402


def place(depth: int = 3) -> str:
    """Semantics: "file:line:function < its caller < ..." of the innermost frames outside torch."""
    frame, names = sys._getframe(2), []
    while frame is not None and len(names) < depth:
        file = Path(frame.f_code.co_filename)
        if "torch" not in file.parts:
            names.append(f"{file.stem}:{frame.f_lineno}:{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)


def breakdown(variant) -> dict:
    """Semantics: {(place, shape, dtype): [how many, bytes]} of what one training forward keeps."""
    known = [*variant.model.train().parameters(), *variant.model.buffers(), *variant.batch.values()]
    seen, rows = {t.untyped_storage().data_ptr() for t in known}, defaultdict(lambda: [0, 0])

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            row = rows[place(), tuple(t.shape), str(t.dtype).removeprefix("torch.")]
            row[0] += 1
            row[1] += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = variant.forward(variant.batch).loss  # keeps the graph, so that no address is used twice
    del loss
    return dict(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--batch", type=int, default=0, help="samples (default: the workload's)")
    parser.add_argument("--lines", type=int, default=20)
    args = parser.parse_args()
    sizes, totals = {"batch": args.batch} if args.batch else {}, []
    for name in ("eager", "patched"):
        variant = vm.make(name, WORKLOADS[args.workload], False, "fp32", **sizes)
        rows = breakdown(variant)
        totals.append(sum(size for _, size in rows.values()))
        print(f"{args.workload} {name}: {totals[-1] / 2**20:.1f} MiB")
        for (where, shape, dtype), (count, size) in sorted(rows.items(), key=lambda row: -row[1][1])[: args.lines]:
            print(f"{size / totals[-1]:7.1%} {size / 2**20:8.2f} MiB  {count:3d} x {shape} {dtype}  {where}")
        del variant
    print(f"patched / eager: {totals[1] / totals[0]:.3f}")


if __name__ == "__main__":
    main()
