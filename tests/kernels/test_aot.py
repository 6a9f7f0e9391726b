"""Every Triton kernel compiles for GPUs that are not here, fits them, and uses their tensor cores where it multiplies.

The compiler itself does not compare shared memory with a limit when no device is present; a launch would fail.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the triton package")

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes one block can have
TENSOR_CORE = {80: ("HMMA",), 90: ("HMMA", "HGMMA"), 100: ("HMMA", "UTCHMMA")}
ADAPTER = ("forward_fused", "forward_down", "forward_up", "backward_fused", "backward_dz", "backward_dx")
SITE = ("site_forward", "site_backward")  # their threads read what others of the block wrote: a barrier lies between
PRODUCTS = (*ADAPTER, *SITE)
TASK_PRODUCTS = ("forward", "backward", "products")  # multi_adapter's kernels that multiply
# ptxas gives up a few registers of its own accord where that fits one more block on an SM (128 instead of 130 registers
# for two blocks of 256 threads, say). That few bytes do not mean a tile too large: those spilled 176 and up.
SPILL_LIMIT = 64


KERNELS = {
    "adapter": (*ADAPTER, "fold_weights", "weight_grads"),
    "site": (*SITE, "fold_weights", "weight_grads", "sum_parts"),
    "multi_adapter": (*TASK_PRODUCTS, "task_weight_grads"),
    "residual_norm": ("forward", "backward", "sum_parts"),
    "phm": ("forward", "backward", "sum_parts"),
    "rows": ("gather", "invert", "merge", "sum_rows"),
}


def compile_all(*arguments):
    """One subprocess: Triton interprets or compiles for the life of a process, and this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_compile.py")
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def complaints(report):
    for k in report:
        where = {key: v for key, v in k.items() if key not in ("instructions", "seconds")}
        if k["shared"] > SHARED_LIMIT[k["arch"]]:
            yield f"too much shared memory: {where}"
        if k["stack"] + k["local"] > SPILL_LIMIT:
            yield f"spills registers: {where}"
        if k["refilled"]:
            yield f"a dot's tile is overwritten while it reads: {where}"
        if k["kernel"] in SITE and not k["barriers"]:
            yield f"no barrier: {where}"
        multiplies = TASK_PRODUCTS if k["op"] == "multi_adapter" else PRODUCTS
        if k["dtype"] != "fp32" and k["kernel"] in multiplies:
            if not any(k["instructions"].get(name) for name in TENSOR_CORE[k["arch"]]):
                yield f"no tensor-core instruction: {where} {k['instructions']}"


def check(report, kernels):
    assert {k["kernel"] for k in report} >= set(kernels), "a kernel was not compiled at all"
    assert {k["arch"] for k in report} == set(SHARED_LIMIT)
    found = list(complaints(report))
    assert not found, "\n".join(found)


def check_own_instructions(report):
    """Hopper's and Blackwell's own matrix instructions appear from 64 rows on, which is what many rows get."""
    for arch, name in ((90, "HGMMA"), (100, "UTCHMMA")):
        large = [k for k in report if k["arch"] == arch and k.get("rows") == 10**6 and k["dtype"] != "fp32"]
        large = [k for k in large if k["kernel"] in PRODUCTS]
        assert large and all(k["instructions"].get(name) for k in large), large


@pytest.fixture(scope="module")
def a_few():
    """All ops in one process. Each dimension of the grid below keeps each of its values; the machine code's
    instructions are told from the PTX's, of which ptxas makes them: the disassembler takes as long as the compiler.
    """
    workers = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # the other core has tests of its own
    return compile_all("--op", ",".join(KERNELS), "--workers", workers)


@pytest.mark.parametrize("op", KERNELS)
def test_a_few_configurations_compile_for_each_architecture(op, a_few):
    report = [k for k in a_few if k["op"] == op]
    check(report, KERNELS[op])
    if op in ("adapter", "site"):
        check_own_instructions(report)


@pytest.mark.slow
@pytest.mark.parametrize("op", KERNELS)
def test_every_configuration_compiles_for_each_architecture(op):
    check(compile_all("--op", op, "--full"), KERNELS[op])


def test_what_counts_as_a_complaint():
    good = dict(
        op="adapter",
        arch=80,
        dtype="bf16",
        kernel="forward_fused",
        shared=1,
        stack=0,
        local=0,
        refilled=0,
        instructions={"HMMA": 1},
    )
    site = good | dict(kernel="site_forward", barriers=1)
    assert list(complaints([good, site])) == []
    for message, change in {
        "no barrier": site | dict(barriers=0),
        "too much shared memory": dict(shared=166_913),
        "spills registers": dict(stack=72),
        "a dot's tile is overwritten": dict(refilled=1),
        "no tensor-core instruction": dict(instructions={"FFMA": 100}),
    }.items():
        (found,) = complaints([good | change])
        assert found.startswith(message)
