"""`bench adapterhub`: the protocol of its second process, its schema and what it refuses, with a stand-in for
AdapterHub's `adapters`; and with the real ones where their folder is. Sizes here mean nothing; no time is asserted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpetl.bench
from fastpetl.bench import adapterhub, cli, machine, models, plan, timing, worker, workloads

HERE = Path(__file__).parent
REAL = HERE.parent / ".adapterhub"
VARIANTS = ["eager", "patched", "adapterhub", "bare", "bare_there"]


@pytest.fixture(autouse=True)
def with_a_stand_in(monkeypatch, tmp_path):
    """One thread: on models this small they wait for each other more than they work."""

    def run(job):
        ask, answer = tmp_path / "job.json", tmp_path / "result.json"
        ask.write_text(json.dumps({**job, "malloc": "default"}))
        worker.main([str(ask), str(answer)])
        return json.loads(answer.read_text())

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(machine, "THREADS", 1)
    monkeypatch.setitem(timing.interleave.__kwdefaults__, "sample_seconds", 0.0)  # a sample is one call
    monkeypatch.setenv(adapterhub.FOLDER, str(HERE / "stand_in"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(file, *more):
    assert fastpetl.bench.main(["adapterhub", "--tiny", "--quick", "--json", str(file), *more]) == 0
    return json.loads(file.read_text())


def check(found, kinds_and_modes):
    assert [(r["model"], r["mode"], r["variant"]) for r in found["rows"]] == [
        (kind, mode, name) for kind, mode in kinds_and_modes for name in VARIANTS
    ]
    assert all(row["status"] == "ok" and row["ms"] > 0 and len(row["samples"]) >= 2 for row in found["rows"])
    compared = {"inference": ["logits"], "train": ["logits", "gradients"]}
    assert [(c["model"], c["mode"], c["variant"], c["what"]) for c in found["checks"]] == [
        (kind, mode, name, what)
        for kind, mode in kinds_and_modes
        for name in ("patched", "adapterhub", "bare_there")
        for what in compared[mode]
    ]
    assert all(0 <= c["error"] < 1e-5 and c["met"] for c in found["checks"])
    bars = {r["against"]: r["bar"] for r in found["ratios"]}
    assert bars == {"eager": None, "adapterhub": 1.0, "bare": None, "bare_there": None}


@pytest.mark.slow  # in make test: the protocol between the processes, how one ends, the packages
def test_schema_and_both_backbones(tmp_path, capsys, monkeypatch):
    helpers = []

    class Load(timing.Load):
        def __init__(self, helper=None):
            helpers.append(helper)
            super().__init__(helper)

    made, original = [], adapterhub._variants
    monkeypatch.setattr(timing, "Load", Load)
    monkeypatch.setattr(adapterhub, "_variants", lambda *a: made.append(original(*a)) or made[-1])
    found = run(tmp_path / "bench.json", "--only", "t5/fp32/inference,bart/fp32/train/patched")
    check(found, [("t5", "inference"), ("bart", "train")])
    assert set(found["adapterhub"]) == {"versions", "pinned", "round_trip_ms"}
    assert found["adapterhub"]["versions"]["adapters"] == "stand-in"
    assert helpers and None not in helpers  # the other process's work is not another's load
    for variants in made:  # at two sublayers of each encoder block, three of each decoder block
        trained = [p for p in variants["patched"].model.parameters() if p.requires_grad]
        assert sorted(tuple(p.shape) for p in trained) == sorted([(4, 32), (4,), (32, 4), (32,)] * (2 * 2 + 2 * 3))
        assert all(r.status == "patched" for r in fastpetl.report(variants["patched"].model))
    printed = capsys.readouterr().out
    for word in ("adapterhub/x", "bare_there: in a process with adapters stand-in, transformers", "(>= 1.0: "):
        assert word in printed


@pytest.mark.slow  # likewise
@pytest.mark.parametrize("what", ["logits", "gradients"])
def test_another_result_is_refused_before_timing(monkeypatch, what):
    original = adapterhub.Remote._results

    def wrong(self, mode):
        found = original(self, mode)
        if what == "logits" and self.name == "adapterhub":
            found["logits"] *= 1.1
        elif what == "gradients" and self.name == "adapterhub":
            name = next(name for name in found["gradients"] if "decoder" in name and "adapter_up" in name)
            found["gradients"][name] *= 2
        return found

    monkeypatch.setattr(adapterhub.Remote, "_results", wrong)
    monkeypatch.setattr(adapterhub, "interleave", lambda *a, **k: pytest.fail("timed a wrong model"))
    mode = "inference" if what == "logits" else "train"
    asked = models.Plan(workloads.WORKLOADS["bart"], True, only=(f"bart/fp32/{mode}",), rounds=1, patience=0.0)
    with pytest.raises(timing.Refused, match=rf"adapterhub \(fp32, {mode}\): {what} differ from .* expected at most"):
        adapterhub.measure(asked, keep_pages=False)


def test_without_the_packages_it_says_what_makes_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(adapterhub.FOLDER, str(tmp_path))
    assert fastpetl.bench.main(["adapterhub", "--tiny"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench adapterhub:")]
    assert said == [
        f"bench adapterhub: {tmp_path} has no `adapters`; python -m pip install --no-deps --target .adapterhub "
        "-r benchmarks/adapterhub-requirements.txt makes it (FASTPETL_ADAPTERHUB names another folder)"
    ]


def test_the_command_is_the_makefiles_and_its_file_pins_everything():
    file = adapterhub.MAKE.rpartition(" ")[2]
    assert f"--target .adapterhub -r {file}" in (HERE.parent / "Makefile").read_text()
    lines = [line for line in (HERE.parent / file).read_text().splitlines() if line and not line.startswith("#")]
    assert "adapters==1.3.0" in lines and all("==" in line for line in lines)


def packages(folder, code):
    (folder / "adapters").mkdir()
    (folder / "adapters/__init__.py").write_text(code)
    return folder


START = {"model": "t5", "tiny": True, "batch": 0, "folder": "", "threads": 1, "keep_pages": False}


def test_protocol(tmp_path):
    code = "print('libraries may print')\nraise ImportError('transformers is too new\\nsecond line')"
    with adapterhub.Helper(packages(tmp_path, code)) as helper:
        assert helper.ask("collect") == {}
        with pytest.raises(timing.Refused, match="failed to start: ImportError: transformers is too new$"):
            helper.ask("start", **START)
        with pytest.raises(timing.Refused, match="failed to dance: AttributeError"):
            helper.ask("dance")
        assert helper.ask("collect") == {}  # a failure is a reply; the next request has its own
    assert helper._process.returncode == 0


def test_a_process_that_ends_says_its_last_words(tmp_path):
    code = "import os, sys\nprint('no memory', file=sys.stderr, flush=True)\nos._exit(3)"
    with adapterhub.Helper(packages(tmp_path, code)) as helper:
        for _ in range(2):
            with pytest.raises(timing.Refused, match="ended with status 3; it printed: no memory"):
                helper.ask("start", **START)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities here")
def test_the_other_side_has_its_cpus_though_we_are_bound_to_one(monkeypatch):
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU")
    monkeypatch.setenv("GOMP_CPU_AFFINITY", f"{cpus[0]} {cpus[1]}")
    try:
        os.sched_setaffinity(0, cpus[:1])  # as OpenMP binds this thread
        with adapterhub.Helper(HERE / "stand_in") as helper:
            helper.ask("collect")
            assert os.sched_getaffinity(helper.pid) == set(cpus[:2])
    finally:
        os.sched_setaffinity(0, cpus)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_load_leaves_out_what_the_helper_uses():
    code = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        busy.stdout.readline()
        everything, others = machine.Load(), machine.Load(busy.pid)
        assert 0.4 < everything._busy() - others._busy() < 5


def test_only_chooses_models_and_modes():
    assert plan.hub_modes((), "t5") == ["inference", "train"]
    assert plan.hub_modes(("bart/fp32/train/patched",), "bart") == ["train"]
    assert plan.hub_modes(("bart/fp32/train/patched",), "t5") == []


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "adapters").is_dir(), reason="`make adapterhub` has not been run")
def test_with_the_real_adapters(monkeypatch, tmp_path):
    monkeypatch.setenv(adapterhub.FOLDER, str(REAL))
    found = run(tmp_path / "bench.json")
    check(found, [(kind, mode) for kind in ("t5", "bart") for mode in ("inference", "train")])
    assert found["adapterhub"]["versions"]["adapters"] == "1.3.0"
