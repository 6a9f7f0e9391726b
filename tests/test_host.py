"""benchmarks/host.py runs as its docstring says."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/host.py"


@pytest.mark.parametrize("options", [[], ["--launches"]])
def test_a_model_is_two_rows_of_two_ratios(tmp_path, options):
    if options:
        pytest.importorskip("triton")
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "vilt", "--seconds", "0.01", *options]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, _, with_adapters, bare = done.stdout.splitlines()
    for row, name in ((with_adapters, "vilt, with adapters"), (bare, "vilt, bare")):
        assert row.startswith(name)
        cells = list(map(float, re.findall(r"\d+\.\d+", row)))
        assert len(cells) == 6
        for eager, patched, ratio in (cells[:3], cells[3:]):
            assert abs(ratio - patched / eager) < 0.05 * ratio + 0.02


@pytest.mark.parametrize("autocast", [False, True])
def test_launches_are_those_of_a_gpu(autocast, tmp_path):
    """Sites, adapters and what follows them go to Triton's launchers, small norms and linears to torch; under autocast
    too.
    """
    pytest.importorskip("triton")
    script = f"""
import collections, contextlib, sys
import torch
sys.path[:0], sys.argv[1:] = [{str(SCRIPT.parent)!r}], ["--launches"]
import host, host_launches
host_launches.pretend(host.WIDTH)
from fastpetl.kernels import launching
launch, counted = launching.launch, collections.Counter()
def count(kernel, *args, **options):
    counted[kernel.__name__] += 1
    launch(kernel, *args, **options)
launching.launch = count
around = torch.autocast("cpu", torch.bfloat16) if {autocast} else contextlib.nullcontext()
model, inputs, optimizer = host.variants("meter", False, True, {autocast})[1]
host.infer(around, model.eval(), inputs, optimizer)
print(dict(counted))
counted.clear()
host.step(around, model.train(), inputs, optimizer)
print(dict(counted))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    forward, step = map(ast.literal_eval, done.stdout.splitlines())
    assert forward == {"site_forward": 24, "forward_fused": 12}
    assert step == forward | {"site_backward": 24, "backward_fused": 12, "weight_grads": 36}
