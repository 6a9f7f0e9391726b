"""benchmarks/tune.py: nothing without a GPU; and what it makes of times."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpetl import _tuned, backends

SCRIPT = Path(__file__).parents[1] / "benchmarks/tune.py"


@pytest.fixture(scope="module")
def tune():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would measure")
def test_without_a_gpu_it_says_so_and_writes_nothing():
    before = _tuned.PATH.read_bytes()
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "there is no CUDA device" in done.stdout
    assert _tuned.PATH.read_bytes() == before


def test_the_usual_backend_stays_unless_another_is_clearly_faster(tune, monkeypatch):
    monkeypatch.setattr(backends, "candidates", lambda *a: ("triton", "composed"))
    assert tune.best("site", torch.float32, {"triton": 1.0, "cuda": 0.98, "composed": 2.0}) == "triton"
    assert tune.best("site", torch.float32, {"triton": 1.0, "cuda": 0.9, "composed": 2.0}) == "cuda"
    assert tune.best("site", torch.float32, {"cuda": 1.0, "composed": 0.5}) == "composed"  # triton was left out


def test_entries_are_added_to_those_there_are(tune):
    old = {
        "sm_80": {"site": {"float16": {"64": {"256": "cuda"}}}},
        "sm_90": {"site": {"float16": {"64": {"256": "cuda"}}}},
    }
    new = {"site": {"float16": {"64": {"2048": "triton"}, "128": {"256": "composed"}}}}
    got = tune.merged(old, "sm_90", new)
    assert got["sm_80"] == old["sm_80"]
    assert got["sm_90"]["site"]["float16"] == {"64": {"256": "cuda", "2048": "triton"}, "128": {"256": "composed"}}
    assert "128" not in old["sm_90"]["site"]["float16"]
    assert all(_tuned.size_class(w) == w for w in tune.WIDTHS)


@pytest.mark.parametrize("op", ["adapter", "site"])
def test_both_ways_of_every_backend_that_serves_are_timed(tune, op):
    from fastpetl.bench import cases

    build = {"adapter": cases.adapter_of, "site": cases.site_of}[op](24)
    times = tune.one(op, build, 40, torch.float32)
    serves = {n for n in backends.BACKENDS[op] if n != "reference" and backends.verify(op, n, "cpu", torch.float32)[0]}
    assert set(times) == {"", "_backward"} and serves
    assert all(set(found) == serves and min(found.values()) > 0 for found in times.values())
