"""benchmarks/host.py runs as its docstring says."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/host.py"


def test_a_model_is_two_rows_of_two_ratios(tmp_path):
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "vilt", "--seconds", "0.01"]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, _, with_adapters, bare = done.stdout.splitlines()
    for row, name in ((with_adapters, "vilt, with adapters"), (bare, "vilt, bare")):
        assert row.startswith(name)
        forward, step = (list(map(float, part.split())) for part in re.split(" {10,}", row.removeprefix(name).strip()))
        for eager, patched, ratio in (forward, step):
            assert abs(ratio - patched / eager) < 0.05 * ratio + 0.02
