"""The demo from end to end, small, and what its report says when something is wrong."""

from __future__ import annotations

import importlib
import json
import math
import os

import pytest
import torch

pytest.importorskip("easy_vqa", reason="the demo's data set is the package easy-vqa")
pytest.importorskip("transformers", reason="the demo's model is Hugging Face's")

import fastpetl.demo
from fastpetl.demo import report, run
from fastpetl.demo.model import SKIPPED_BLOCKS, VARIANTS

RUN_KEYS = {
    *("variant", "accuracy", "total_parameters", "trainable_parameters", "macs_per_sample", "seconds_per_step"),
    *("samples_per_second", "peak_memory_mib", "train_seconds", "losses"),
}


def not_blank(path) -> bool:
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    colours = picture.getcolors(picture.width * picture.height)
    return min(picture.size) > 300 and len(colours) > 50


@pytest.fixture
def one_child(monkeypatch):
    """The first of a demo's processes is one; what the others would run runs here: each would import for seconds."""
    child, started, threads = run._child, [], torch.get_num_threads()

    def here(module, *arguments):
        started.append(module)
        if len(started) == 1:
            return child(module, *arguments)
        assert importlib.import_module(f"fastpetl.demo.{module}").main([*map(str, arguments)]) == 0

    monkeypatch.setattr(run, "_child", here)
    yield started
    torch.set_num_threads(threads)


def test_quick_run_writes_results_and_plots(tmp_path, capfd, one_child):
    out = tmp_path / "made" / "here"
    assert fastpetl.demo.main(["--quick", "--threads", "1", "--out", str(out)]) == 0
    assert one_child == ["train"] * len(VARIANTS) + ["compare"]
    assert sorted(os.listdir(out)) == ["costs.png", "losses.png", "results.json"]
    assert not_blank(out / "losses.png") and not_blank(out / "costs.png")
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"settings", "environment", "runs", "comparison", "checks", "passed", "total_seconds"}
    assert results["settings"]["skipped_blocks"] == list(SKIPPED_BLOCKS) and results["passed"] is True
    runs = {found["variant"]: found for found in results["runs"]}
    assert tuple(runs) == VARIANTS
    for found in runs.values():
        assert set(found) == RUN_KEYS
        assert len(found["losses"]) == run.QUICK["steps"] and all(map(math.isfinite, found["losses"]))
        assert 0 <= found["accuracy"] <= 1 and found["seconds_per_step"] > 0
    full, das, skipped = runs["full"], runs["adapters"], runs["skipped"]
    assert full["trainable_parameters"] == full["total_parameters"] > das["trainable_parameters"] > 0
    assert full["macs_per_sample"] < das["macs_per_sample"] == runs["patched"]["macs_per_sample"]
    assert skipped["macs_per_sample"] < 0.75 * das["macs_per_sample"]
    assert set(results["comparison"]["speedup_over_unpatched"]) == set(VARIANTS)
    assert all(delta["relative"] <= 1e-4 for delta in results["comparison"]["delta_logits"].values())
    printed = capfd.readouterr().out
    assert "DAS adapters, patched" in printed and str(out) in printed and "FAILED" not in printed


def made_up(**changes) -> tuple[dict, dict]:
    """Runs and comparison of a demo in which all is well, but for ``changes`` ({variant: accuracy}, loss=, delta=)."""
    accuracy = {"full": 0.96, "adapters": 0.95, "patched": 0.95, "skipped": 0.8, **changes}
    common = {"total_parameters": 10, "trainable_parameters": 1, "macs_per_sample": 1e6, "seconds_per_step": 0.1}
    common |= {"samples_per_second": 10.0, "peak_memory_mib": 50.0, "train_seconds": 1.0}
    runs = {v: {"variant": v, "accuracy": accuracy[v], "losses": [2.0, 1.0], **common} for v in VARIANTS}
    runs["patched"]["losses"] = [2.0, 1.0 + changes.get("loss", 0.0)]
    delta = {"max_abs": 1e-6, "relative": changes.get("delta", 1e-7)}
    comparison = {"delta_logits": {"patched": delta, "skipped": delta}}
    comparison |= {
        "seconds_per_step": dict.fromkeys(VARIANTS, 0.1),
        "speedup_over_unpatched": dict.fromkeys(VARIANTS, 1.0),
    }
    return runs, comparison


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"full": 0.89, "adapters": 0.89, "patched": 0.89}, "test accuracy of full fine-tuning"),
        ({"adapters": 0.90}, "test accuracy of adapters, share of full fine-tuning's"),
        ({"patched": 0.90}, "test accuracy of patched, share of full fine-tuning's"),
        ({"delta": 2e-4}, "|delta logit| of patched, relative"),
        ({"delta": math.nan}, "|delta logit| of patched, relative"),
        ({"loss": 2e-3}, "|delta loss| of patched over 50 steps, relative"),
    ],
)
def test_exit_code_tells_whether_the_checks_passed(changes, failed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "measure", lambda settings: made_up(**changes))
    assert fastpetl.demo.main(["--out", str(tmp_path)]) == (1 if failed else 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert (lines and failed in lines[0]) if failed else not lines
    assert json.loads((tmp_path / "results.json").read_text())["passed"] is not bool(failed)


def test_quick_run_does_not_check_accuracies():
    names = [check["name"] for check in report.checks(*made_up(full=0.1), accuracy=False)]
    assert names and not any("accuracy" in name for name in names)


def test_bad_numbers_on_the_command_line_are_errors(capsys):
    for option in ("--steps", "--threads"):
        with pytest.raises(SystemExit) as stop:
            fastpetl.demo.main([option, "0"])
        assert stop.value.code == 2 and f"{option} is 0, expected 1 or more" in capsys.readouterr().err


def test_a_run_that_fails_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="fastpetl.demo.train full failed with exit code 1"):
        run._child("train", "full", tmp_path / "missing.json", tmp_path / "result.json")
