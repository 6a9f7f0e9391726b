"""python -m fastpetl search, at a size that proves only that it runs, and that what it holds out nothing trains on."""

import json

import pytest
import torch

from fastpetl.das import SearchedPlan
from fastpetl.demo import search
from fastpetl.demo.model import Settings


def test_search_runs_and_writes(tmp_path, capsys):
    argv = ["--quick", "--out", str(tmp_path), "--skip", "3", "--turn", "2", "--compare", "1", "--steps", "4"]
    threads = torch.get_num_threads()
    try:
        assert search.main([*argv, "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    plan = SearchedPlan.load(tmp_path / "plan.json")
    assert len(plan.blocks) == 3 and [r["step"] for r in plan.rounds] == [2, 4] and len(plan.gates) == 12
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert list(runs) == ["nothing skipped", "searched", "random 1"]
    assert runs["searched"]["blocks"] == list(plan.blocks) and len(runs["random 1"]["blocks"]) == 3
    assert "M MACs of a sample saved" in capsys.readouterr().out


def test_search_within_a_budget(tmp_path, capsys):
    argv = ["--quick", "--out", str(tmp_path), "--turn", "2", "--steps", "2", "--candidates", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert search.main([*argv, "--budget-macs", "15e6"]) == 0
    finally:
        torch.set_num_threads(threads)
    plan, saved = SearchedPlan.load(tmp_path / "plan.json"), 28.1e6 / 4  # of a block
    assert len(plan.blocks) == 3 and 15e6 < plan.macs_saved < 15e6 + saved
    assert all(len(chosen) == 3 for chosen in plan.rounds[0]["sets"])
    assert f"{plan.macs_saved / 1e6:.1f} M MACs of a sample saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--skip", "13"], "--skip is 13, expected 1 to 12"),
        (["--skip", "12"], "--candidates is 3, but there are only 1 sets of 12"),
        (["--turn", "0"], "--turn is 0, expected 1 or more"),
        (["--candidates", "1"], "--candidates is 1, expected 2 or more"),
        (["--threads", "0"], "--threads is 0, expected 1 or more"),
        (["--compare", "-1"], "--compare is -1, expected 0 or more"),
        (["--skip", "4", "--budget-macs", "1e6"], "--budget-macs: not allowed with argument --skip"),
        (["--budget-macs", "much"], "--budget-macs: invalid float value: 'much'"),
        (["--budget-macs", "nan"], "--budget-macs is nan, expected more than 0 and at most "),
        (["--budget-macs", "0"], "--budget-macs is 0.0, expected more than 0 and at most "),
        (["--budget-macs", "1e12"], "--budget-macs is 1000000000000.0, expected more than 0 and at most "),
        (["--budget-macs", "84e6"], "--candidates is 3, but only 1 different sets of blocks were found"),
    ],
)
def test_impossible_requests(argv, message, capsys):
    with pytest.raises(SystemExit):
        search.main(argv)
    assert message in capsys.readouterr().err


def test_validation_questions_are_held_out():
    training, validation = search._data(Settings(train_limit=40))
    assert len(training) == 30 and len(validation) == 10
    together = torch.cat([training.answers, validation.answers])
    whole = search.data.load("train", "downstream", limit=40)
    assert torch.equal(together, whole.answers)
    assert torch.equal(validation.batch(torch.arange(2))["input_ids"], whole.batch(torch.arange(30, 32))["input_ids"])
