"""The benchmark: its JSON, what it refuses to time, and its way with samples. Sizes here mean nothing; no time is
asserted.
"""

import dataclasses
import json

import pytest
import torch

import fastpetl.bench
from fastpetl.bench import (
    cases,
    cli,
    machine,
    models,
    ops,
    plan,
    report,
    skip,
    tasks,
    timing,
    variant,
    worker,
    workloads,
)

ROW = {"model", "dtype", "mode", "variant", "status", "ms", "spread", "samples", "thrown_away", "loaded"}
QUIET = {"rounds": 3, "patience": 0.0}


@pytest.fixture(autouse=True)
def one_thread():
    """On models this small threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """For all commands but the first below: the measuring process would import for seconds."""

    def run(job):
        ask, answer = tmp_path / "job.json", tmp_path / "result.json"
        ask.write_text(json.dumps({**job, "malloc": "default"}))
        assert worker.main([str(ask), str(answer)]) == 0
        return json.loads(answer.read_text())

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(machine, "THREADS", 1)
    monkeypatch.setitem(timing.interleave.__kwdefaults__, "sample_seconds", 0.0)  # a sample is one call


def test_command_line_writes_the_schema(tmp_path, capsys):
    file = tmp_path / "bench.json"
    only = "fp32/inference/patched,fp32/memory/patched"
    assert fastpetl.bench.main(["vilt", "--tiny", "--quick", "--only", only, "--json", str(file)]) == 0
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert found["schema"] == 1 and found["bench"] == "vilt"
    assert [(row["dtype"], row["mode"], row["variant"]) for row in found["rows"]] == [
        ("fp32", "inference", "eager"),
        ("fp32", "inference", "patched"),
    ]
    assert all(set(row) == ROW and row["ms"] > 0 and row["status"] == "ok" for row in found["rows"])
    assert [(r["against"], r["bar"], type(r["met"])) for r in found["ratios"]] == [("eager", 2.1, bool)]
    assert [(c["variant"], c["what"], c["met"]) for c in found["checks"]] == [("patched", "logits", True)]
    assert [m["variant"] for m in found["memory"]] == ["patched"] and found["memory"][0]["saved_mib"] > 0
    assert found["machine"][0]["threads"] == 2 and found["machine"][0]["versions"]["torch"] == torch.__version__
    for word in ("patched against", "ratio of medians", "saved for backward", "checked before timing", "threads"):
        assert word in printed


def test_models_at_another_batch_has_no_bars(tmp_path, in_this_process):
    file = tmp_path / "bench.json"
    only = "vlbart/fp32/train/patched,vlt5/fp32/train/patched,vlt5/fp32/memory/patched"
    command = ["models", "--tiny", "--quick", "--batch", "1", "--only", only, "--json", str(file)]
    assert fastpetl.bench.main(command) == 0
    found = json.loads(file.read_text())
    assert [(row["model"], row["variant"], row["status"]) for row in found["rows"]] == [
        (model, name, "ok") for model in ("vlbart", "vlt5") for name in ("eager", "patched")
    ]
    assert [(r["bar"], r["met"]) for r in found["ratios"]] == [(None, None)] * 2
    assert [(m["model"], m["variant"]) for m in found["memory"]] == [("vlt5", "patched")]
    assert all("batch 1" in facts["config"]["workload"] for facts in found["machine"])


def test_batch_is_for_models(capsys):
    assert fastpetl.bench.main(["ops", "--batch", "2"]) == 2
    assert "--batch is for vilt and models and methods and adapterhub, not for ops" in capsys.readouterr().err
    for batch in ("-1", "0"):
        assert fastpetl.bench.main(["vilt", "--batch", batch]) == 2
        assert f"--batch is {batch}, expected a positive number" in capsys.readouterr().err


def test_a_wrong_baseline_is_a_row_that_says_so(monkeypatch):
    def wrong(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        out.logits = out.logits * (1.1 if self.name == "compile" else 1)
        return out

    original = variant.Variant.forward
    monkeypatch.setattr(variant.Variant, "forward", wrong)
    eager_only = dataclasses.replace(workloads.VLBART, compile=lambda model: None)
    only = ("fp32/inference/patched", "fp32/inference/compile")
    found = models.measure(models.Plan(eager_only, True, only=only, **QUIET), "fp32")
    statuses = {row["variant"]: row["status"] for row in found["rows"]}
    assert statuses["patched"] == statuses["eager"] == "ok"
    assert "logits differ from eager's by 1.0e-01, expected at most" in statuses["compile"]
    assert [r["against"] for r in models.ratios(found["rows"])] == ["eager"]


def test_only_that_matches_nothing_says_so(capsys):
    assert fastpetl.bench.main(["vilt", "--only", "fp64/"]) == 2
    assert "matches nothing, expected" in capsys.readouterr().err


def test_jobs_follow_only():
    assert [(j["kind"], j["dtype"]) for j in plan.model_jobs(("vilt",), (), False)] == [
        *[("time", "fp32"), ("time", "bf16"), ("time", "autocast")],
        *[("memory", "fp32")] * 2,
        *[("memory", "bf16")] * 2,
        *[("memory", "autocast")] * 2,
    ]
    assert plan.model_jobs(("vilt",), ("bf16/memory/eager",), True)[-1]["kind"] == "losses"
    assert plan.model_variants((), "vilt", "bf16", "train") == ["eager", "compile", "patched"]
    assert plan.model_variants(("fp32/train/patched",), "vilt", "fp32", "train") == ["eager", "patched"]
    assert plan.model_variants(("fp32/train/patched",), "vilt", "fp32", "inference") == []


@pytest.mark.parametrize("dtype", plan.PRECISIONS)
@pytest.mark.parametrize("mode", plan.MODES)
def test_a_wrong_model_is_refused_before_timing(monkeypatch, dtype, mode):
    def wrong(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        if self.name == "patched":
            out.logits = out.logits * 1.1
            out.loss = None if out.loss is None else out.loss * 1.1
        return out

    original = variant.Variant.forward
    monkeypatch.setattr(variant.Variant, "forward", wrong)
    monkeypatch.setattr(models, "interleave", lambda *a, **k: pytest.fail("timed a wrong model"))
    with pytest.raises(timing.Refused, match=rf"patched \({dtype}, {mode}\): logits differ .* expected at most"):
        models.measure(models.Plan(workloads.VILT, True, only=(f"{dtype}/{mode}/patched",), **QUIET), dtype)


def test_wrong_gradients_are_refused(monkeypatch):
    original = variant.Variant.gradients

    def wrong(self):
        logits, grads = original(self)
        return logits, grads * 1.01 if self.name == "patched" else grads

    monkeypatch.setattr(variant.Variant, "gradients", wrong)
    with pytest.raises(timing.Refused, match="gradients differ"):
        models.measure(models.Plan(workloads.VILT, True, only=("fp32/train/patched",), **QUIET), "fp32")


@pytest.mark.parametrize("mode", ops.MODES)
def test_a_wrong_op_is_refused_before_timing(monkeypatch, mode):
    def broken(built, name):
        function = ops.implementation(built, name)
        return function if name == "eager" else lambda *inputs: function(*inputs) * (1 + 1e-5)

    monkeypatch.setattr(ops, "interleave", lambda *a, **k: pytest.fail("timed a wrong op"))
    small = ops.Plan(cases.TINY, only=(f"fp32/adapter/r96/{mode}/cpp",), **QUIET)
    if not ops.selected(small):
        pytest.skip("fastpetl._C is not built: there is no fused backend to time")
    with pytest.raises(timing.Refused, match="cpp .* nothing was timed"):
        ops.measure(small, implement=broken)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_every_case_computes_its_formula(case, dtype):
    """Each fused backend and the reference, forward and backward, on sizes that mean nothing."""
    built = case.build(cases.TINY, cases.Maker(ops.DTYPES[dtype], "cpu", seed=3))
    grads = ops.cotangents(built)
    functions = {n: ops.implementation(built, n) for n in ["eager", *ops.fused(case, dtype), "reference"]}
    checks = ops.verify(built, functions, grads, case.name)
    assert [c["variant"] for c in checks] == list(functions)[1:]
    assert built.flop > 0 and min(built.reads_writes) > 0


def test_ops_of_the_command_line(tmp_path, capsys, in_this_process):
    file = tmp_path / "ops.json"
    assert fastpetl.bench.main(["ops", "--tiny", "--quick", "--only", "fp32/adapter/r96", "--json", str(file)]) == 0
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    variants = {row["variant"] for row in found["rows"]}
    assert {"eager", "compile"} <= variants and all(row["gflops"] > 0 for row in found["rows"])
    assert {r["bar"] for r in found["ratios"] if r["against"] == "eager"} == {2.2, 2.3}
    for word in ("eager/x", "routed/x", "GB/s of floor", "slower than a baseline"):
        assert word in printed


def test_routed_eager_is_only_timed_in_fp32(monkeypatch):
    """A switch that computed in another precision is a row that says so, not a baseline."""
    monkeypatch.setattr(variant, "route_reason", lambda: "would compute in bf16")
    found = models.measure(models.Plan(workloads.VILT, True, only=("fp32/inference/routed",), **QUIET), "fp32")
    rows = {row["variant"]: row for row in found["rows"]}
    assert rows["routed"]["status"] == "would compute in bf16" and rows["eager"]["status"] == "ok"
    result = {"rows": found["rows"], "ratios": [], "checks": [], "memory": [], "tuned": []}
    assert "not available: would compute in bf16" in report.models(result)


def test_route_restores_the_switch_and_is_judged_by_its_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    reason = variant.route_reason()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert reason is None or "bf16" in reason or "oneDNN" in reason


def test_saved_bytes_counts_storages_once_and_no_parameters():
    eager = variant.make("eager", workloads.VILT, True, "fp32")
    tokens = 2 * (8 + 6 + 1)
    activations = models.saved_bytes(eager)
    assert tokens * 64 * 4 * 10 < activations < tokens * 64 * 4 * 200
    assert models.saved_bytes(eager) == activations


def test_losses_agree():
    steps = []
    found = variant.losses(workloads.VILT, True, 4, steps.append)
    assert found["met"] and len(found["eager"]) == len(found["patched"]) == 4 and len(steps) == 8
    assert found["eager"][0] != found["eager"][1]  # the batches differ


def test_samples_are_interleaved_and_the_order_reversed(monkeypatch):
    monkeypatch.setattr(timing.Load, "foreign", lambda self: 0.0)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.interleave(calls, rounds=2, warmups=1, sample_seconds=0.0)
    assert order == ["a", "a", "b", "b", "a", "b", "b", "a"]  # warm-up and one call for its duration, then the rounds
    assert [len(t.clean) for t in found.values()] == [2, 2]


def test_loaded_samples_are_redone_and_counted(monkeypatch):
    loads = iter([0.0, 1e9, 0.0, 0.0])
    monkeypatch.setattr(timing.Load, "foreign", lambda self: next(loads))
    monkeypatch.setattr(timing.Load, "wait_idle", lambda self, seconds: None)
    found = timing.interleave({"a": lambda: sum(range(200000))}, rounds=3, warmups=0, sample_seconds=0.0)["a"].row()
    assert len(found["samples"]) == 3 and found["thrown_away"] == 1 and not found["loaded"]


def test_with_nothing_but_loaded_samples_the_row_says_so(monkeypatch):
    monkeypatch.setattr(timing.Load, "foreign", lambda self: 1e9)
    calls = {"a": lambda: sum(range(200000))}
    row = timing.interleave(calls, rounds=4, warmups=0, sample_seconds=0.0, patience=0.0)["a"].row()
    assert row["loaded"] and len(row["samples"]) == 2 and row["thrown_away"] == 2
    assert report.milliseconds(row).startswith("~")


def test_ratios_are_of_medians():
    rows = [
        {"model": "vilt", "dtype": "fp32", "mode": "train", "variant": name, "status": "ok", "ms": ms}
        for name, ms in (("eager", 30.0), ("routed", 11.0), ("patched", 10.0))
    ]
    found = {r["against"]: (r["ratio"], r["bar"], r["met"]) for r in models.ratios(rows)}
    assert found == {"eager": (3.0, 2.0, True), "routed": (1.1, 1.2, False)}


def test_environment_pins_and_caps():
    env = machine.environment(cap_onednn=True)
    assert env["OMP_NUM_THREADS"] == "2" and env["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"


SKIPPED = {  # model -> settings of the static plan's own mode, settings with a ratio
    "vilt": (["static", "masks", "keep-all masks"], ["static", "masks", "keep-all masks"]),
    "meter": (["static", "no adapters"], ["static", "no adapters"]),
}


@pytest.mark.parametrize("model", SKIPPED)
def test_skip_writes_what_became_of_the_macs(model, tmp_path, capsys, in_this_process):
    file, settings = tmp_path / "skip.json", ["nothing skipped", *SKIPPED[model][0]]
    only = f"{model}/inference,{model}/scoring"
    assert fastpetl.bench.main(["skip", "--tiny", "--quick", "--only", only, "--json", str(file)]) == 0
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [(r["model"], r["mode"], r["variant"]) for r in found["rows"]] == [
        *[(model, "inference", name) for name in settings],
        *[(model, "scoring", name) for name in ("three passes", "one pass")],
    ]
    assert all(set(row) == ROW for row in found["rows"])
    assert [r["setting"] for r in found["ratios"]] == [*SKIPPED[model][1], "one pass"]
    compared = [name for name in settings if name != "no adapters"]
    assert [(c["setting"], c["what"], c["met"]) for c in found["checks"]] == [(n, "logits", True) for n in compared]
    assert "of the MACs" in printed and "one pass over three" in printed


def test_skip_runs_what_was_asked_for():
    asked = skip.Plan(only=("train/static",))
    assert asked.settings("train") == ["nothing skipped", "static"]
    assert asked.settings("inference") == asked.passes() == []
    assert skip.Plan("meter").settings("train") == ["nothing skipped", "static"]
    assert skip.Plan("meter", only=("no adapters",)).settings("inference") == [
        *["nothing skipped", "static", "no adapters"]  # the last says something of the second
    ]
    models = [[job["model"] for job in plan.skip_jobs(only)] for only in ((), ("meter",), ("masks",), ("x",))]
    assert models == [["vilt", "meter"], ["meter"], ["vilt"], []]


def test_skip_counts_meters_plan_as_the_paper_does():
    """2 text and 2 image layers: -11.97 % by fvcore's convention, at full size, without memory or arithmetic."""
    case = skip.CASES["meter"]
    model, inputs = fastpetl.count._meter(384, 384, 40)
    plain = getattr(fastpetl.count(model, inputs), case.convention)
    fastpetl.attach(model, fastpetl.DASConfig(), patch=False)
    fastpetl.skip(model, fastpetl.SkipPlan(case.plan))
    assert round(100 * (getattr(fastpetl.count(model, inputs), case.convention) / plain - 1), 2) == -11.97


def test_skip_refuses_a_patched_model_that_computes_something_else(monkeypatch):
    right = fastpetl.ops.linear
    monkeypatch.setattr(fastpetl.ops, "linear", lambda *a, **k: 1.1 * right(*a, **k))
    with pytest.raises(timing.Refused, match=r"nothing was timed \(meter, nothing skipped\)"):
        skip.measure(skip.Plan("meter", tiny=True, only=("meter/train",), rounds=1, patience=0.0))


def test_skip_refuses_one_pass_that_is_not_three(monkeypatch):
    monkeypatch.setattr(
        fastpetl.skip.policies.Candidates, "masks", lambda self, x, n, t: (torch.zeros(6, n).bool(), None)
    )
    with pytest.raises(timing.Refused, match="bench skip: one pass over the candidates differs from three by"):
        skip.measure(skip.Plan(tiny=True, only=("scoring",), rounds=1, patience=0.0))


def test_tasks_writes_decoding_and_mixing(tmp_path, capsys, in_this_process):
    file = tmp_path / "tasks.json"
    assert fastpetl.bench.main(["tasks", "--tiny", "--quick", "--json", str(file)]) == 0
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [(r["mode"], r["variant"]) for r in found["rows"]] == [
        *[("decode", name) for name in ("adapter", "bare", "compacter", "hyperformer", "lora")],
        *[(mode, name) for mode in ("inference", "train", "gradients") for name in ("one task", "four tasks")],
    ]
    assert all(set(row) == ROW and row["ms"] > 0 for row in found["rows"])
    settings = ["compacter", "hyperformer", "lora", *["four tasks"] * 3]
    assert [r["setting"] for r in found["ratios"]] == settings
    assert "time over adapter's" in printed and "time over one task's" in printed
    assert tasks.Plan(only=("decode/lora",)).methods() == ["bare", "lora"]
    assert tasks.Plan(only=("decode/lora",)).mixed() == [] and tasks.Plan(only=("train/mixed",)).mixed() == ["train"]


def test_tasks_refuses_other_tokens(monkeypatch):
    monkeypatch.setattr(fastpetl, "patch", lambda model: model.lm_head.weight.data.neg_())
    with pytest.raises(timing.Refused, match="bench tasks: patched adapter generates other tokens than unpatched"):
        tasks.decoder("adapter", True)
