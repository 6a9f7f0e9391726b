"""The examples run, on little, and what they ship is what their scripts make."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("easy_vqa", reason="easy-vqa is not installed: the examples' data")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import easy_vl as ev  # noqa: E402
import make_backbone  # noqa: E402
import multitask_vlbart as multitask  # noqa: E402


def test_multitask_prints_the_table_and_writes_it(tmp_path):
    out, command = tmp_path / "out", [sys.executable, str(EXAMPLES / "multitask_vlbart.py")]
    options = ["--steps", "3", "--batch", "8", "--limit", "8", "--only", "adapters, multiple", "full fine-tuning"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([*command, "--out", str(out), *options], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| adapters, multiple |" in done.stdout and "| full fine-tuning | 100.0% |" in done.stdout
    rows = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in rows] == ["adapters, multiple", "full fine-tuning"]
    for row in rows:
        assert set(row["accuracy"]) == set(ev.TASKS) and len(row["losses"]) == 3 and row["step_ms"] > 0
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_backbone_is_the_scripts_and_knows_its_task():
    """Weights fit, and held-out captions with words hidden are filled in rightly."""
    model, tokenizer = multitask.backbone().eval(), ev.Tokenizer.load()
    assert json.loads((ev.ASSETS / "config.json").read_text()).items() >= make_backbone.SIZES.items()
    assert sum(file.stat().st_size for file in ev.ASSETS.iterdir()) < 4e6
    captions = {image: text for image, text in ev.captions("train").items() if image % 20 == 0}
    images = list(captions)[:64]
    batches = ev.Batches(ev.features("train", images, quiet=True), tokenizer)
    test = [make_backbone.masked(captions[i], i, random.Random(i)) for i in images]
    with torch.inference_mode():
        out = model.generate(**batches.inputs(test), max_new_tokens=5, do_sample=False)
    right = [a == s.answer for a, s in zip(tokenizer.decode(out), test, strict=True)]
    assert sum(right) >= 0.9 * len(right)


def test_the_tasks():
    train, test = ev.samples("train", lambda image: image % 2 == 1), ev.samples("test")
    assert {s.task for s in train} == {s.task for s in test} == set(ev.TASKS)
    assert all(s.image % 2 == 1 for s in train)
    known = set(ev.Tokenizer.load().names)
    for s in train + test:
        assert s.text.startswith(f"{s.task} : ") and known >= set(ev.words(s.text)) | set(ev.words(s.answer))
    tokenizer = ev.Tokenizer.load()
    ids = tokenizer.encode(["a red circle", "yes"], start=False)
    assert tokenizer.decode(ids) == ["a red circle", "yes"] and (ids[1, 2:] == tokenizer.pad).all()
    drawn = ev.proportional({"a": [1] * 9, "b": [2]}, random.Random(0), 1000, mixed=True)
    assert 50 < sum(x == 2 for x in drawn) < 150
    assert len(set(ev.proportional({"a": [1], "b": [2]}, random.Random(0), 9, mixed=False))) == 1
