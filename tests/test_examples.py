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

import fastpetl  # noqa: E402

TRAINED = {  # of the tiny backbone, as attach and count say it at these sizes
    "full fine-tuning": fastpetl.BaselineConfig(train="all"),
    "adapters, single": fastpetl.AdapterConfig(tasks=ev.TASKS),
    "adapters, half-shared": fastpetl.AdapterConfig(tasks=ev.TASKS, sharing="half"),
    "adapters, multiple": fastpetl.AdapterConfig(tasks=ev.TASKS, sharing="multiple"),
    "Hyperformer": fastpetl.HyperformerConfig(tasks=ev.TASKS),
    "Compacter": fastpetl.CompacterConfig(tasks=ev.TASKS),
    "LoRA": fastpetl.LoRAConfig(tasks=ev.TASKS, rank=16, alpha=16),
    "prompts": fastpetl.PromptConfig(tasks=ev.TASKS, length=8, middle=96),
}


@pytest.mark.slow  # in make test: the backbone and the tasks, below
def test_multitask_prints_the_table_and_writes_it(tmp_path):
    """All eight methods of the paper's table: a step each, mixed batches, four tasks' accuracies."""
    out, command = tmp_path / "out", [sys.executable, str(EXAMPLES / "multitask_vlbart.py")]
    options = ["--steps", "1", "--batch", "4", "--limit", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([*command, "--out", str(out), *options], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text())
    printed = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert printed[0] == ["method", "trained", *ev.TASKS, "mean", "step"]
    assert [row["method"] for row in rows] == [line[0] for line in printed[1:]] == list(multitask.METHODS)
    assert set(multitask.METHODS) == set(TRAINED)
    for row, line in zip(rows, printed[1:], strict=True):
        counted = fastpetl.count(fastpetl.attach(multitask.backbone(), TRAINED[row["method"]], patch=False))
        assert (row["trainable"], row["total"]) == (counted.trainable, counted.total)
        assert line[1] == f"{counted.trainable_percent:.1f}%" and len(line) == len(printed[0])
        assert set(row["accuracy"]) == set(ev.TASKS) and len(row["losses"]) == 1 and row["step_ms"] > 0
        assert all(0 <= found <= 1 for found in row["accuracy"].values())
    shares = {row["method"]: row["trainable"] / row["total"] for row in rows}
    assert shares["full fine-tuning"] == 1 and max(v for k, v in shares.items() if k != "full fine-tuning") < 0.5
    assert shares["adapters, single"] < shares["adapters, half-shared"] < shares["adapters, multiple"]
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
