"""The GPU suite runs to its end where there is no GPU, writes what it found and says that it means nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).parents[1] / "benchmarks/gpu_suite.py"


def suite(folder, *args):
    command = [sys.executable, str(SUITE), "--results", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the suite itself")
def test_some_stages_without_a_gpu(tmp_path):
    done = suite(tmp_path, "--only", "sanitizer,spills,scoring")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert list(found["stages"]) == ["facts", "sanitizer", "spills", "scoring"] and found["spills"]["ok"] is None
    (row,) = found["scoring"]
    assert row["three_passes_ms"] > 0 and row["one_pass_ms"] > 0 and row["difference"] < 5e-2
    text = file.with_suffix(".md").read_text()
    assert "sizes and times here mean nothing" in text and "| vilt |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the suite itself")
def test_the_stage_of_whole_models_but_compiled(monkeypatch, tmp_path):
    """With too little time left for torch.compile, which takes longest."""
    monkeypatch.syspath_prepend(str(SUITE.parent))
    monkeypatch.setenv("FASTPETL_SUITE_OUT", str(tmp_path / "kept.json"))
    import gpu_measure

    rows = gpu_measure.model(39)
    names = ["eager", "patched", "bare, patched", "skip a third, patched"]
    assert [(row["variant"], row["status"]) for row in rows] == [
        *((name, "ok") for name in names),
        ("compile", "not run: out of time"),
    ]
    assert all(row["step_ms"] > 0 for row in rows[:4]) and json.loads((tmp_path / "kept.json").read_text()) == rows[:4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the suite itself")
def test_a_stage_out_of_time_is_a_line_not_the_end(tmp_path):
    done = suite(tmp_path, "--minutes", "0.01")
    assert done.returncode == 1 and "not run: out of time" in done.stdout
    assert len(list(tmp_path.glob("*.md"))) == 1


def test_op_tests_that_are_cut_off_have_said_why(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SUITE.parent))
    import gpu_stages

    tests = "import os\ndef test_one():\n    assert 1 == 2, 'not\\nequal'\n"
    (tmp_path / "test_them.py").write_text(tests + "def test_two(): pass\ndef test_three(): os._exit(9)\n")
    command = [sys.executable, *"-m pytest -v -p conftest -c".split(), os.devnull, "--rootdir", tmp_path, tmp_path]
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    found = gpu_stages.run(command, 100, keep=10**8, FASTPETL_TEST_WHY="1", PYTHONPATH=path)
    first, second, *_ = gpu_stages.reasons(found["tail"]).splitlines()
    assert not found["ok"] and first == "passed 1, failed 1"
    assert second == "WHY test_them.py::test_one: AssertionError: not"


@pytest.mark.slow  # those above stay: the driver, a process for each stage, both files, models
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the suite itself")
def test_every_stage_without_a_gpu(tmp_path):
    done = suite(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert all(check["ok"] for check in found["checks"])
    assert {row["variant"] for row in found["model"]} >= {"eager", "compile", "patched", "bare, patched"}
