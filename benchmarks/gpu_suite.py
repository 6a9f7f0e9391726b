"""All that a GPU has to say about fastpetl, in one command: python benchmarks/gpu_suite.py [--minutes 9]

Builds, runs the op tests on the GPU, checks every op's numbers (also on another stream, in a captured graph, and on a
device that is not the current one), lets compute-sanitizer look at small cases, reads the kernels' spills, then
measures: each op against eager and max-autotune, whole models against eager and compiled, the adapters' tax, what
skipping gives back, candidates scored in one pass. Writes one JSON and one Markdown table into benchmarks/results/, to
be committed.

Each stage (gpu_stages.py, gpu_measure.py) is a process with a time limit; what one cannot do is a line that says why,
and the next goes on. What is not timed runs side by side. Without a GPU every stage runs to its end on the CPU with
sizes that mean nothing, Triton in its interpreter; the files then go to a temporary folder and say so.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import gpu_measure
import gpu_stages as stages

ROOT = stages.ROOT
GROUPS = (  # stages of a group run side by side; seconds each may take
    {"facts": 60},
    {"build": 200},
    {"tests": 150, "checks": 150, "sanitizer": 120, "spills": 100},
    {"ops": 170},
    {"model": 150},
    {"scoring": 40},
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all stages together")
    parser.add_argument("--only", default="", help="comma-separated stages")
    parser.add_argument("--results", type=Path, help="folder of the result files")
    parser.add_argument("--stage", choices=[*(n for g in GROUPS for n in g), "small"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.stage:
        correct_interpreter()
        stage = getattr(stages, args.stage, None) or getattr(gpu_measure, args.stage)
        value = stage(float(os.environ.get("FASTPETL_SUITE_LIMIT", 60)))
        stages.keep(value)
        return 0
    return Driver(args).drive()


def correct_interpreter():
    """Where Triton interprets, bf16 is right only with what the tests correct."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("interp_patch")


class Driver:
    """Runs the stages and keeps the result file up to date: a lease that ends keeps what there is."""

    def __init__(self, args):
        self.only, self.end = args.only.split(",") if args.only else [], time.time() + 60 * args.minutes
        self.here = stages.gpu()
        default = ROOT / "benchmarks/results" if self.here else None
        self.folder = args.results or default or Path(tempfile.mkdtemp(prefix="fastpetl-suite-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.json"
        self.result, self.lock = {"facts": {}, "stages": {}}, threading.Lock()

    def drive(self) -> int:
        for group in GROUPS:
            wanted = {n: s for n, s in group.items() if not self.only or n in self.only or n == "facts"}
            threads = [threading.Thread(target=self.stage, args=item) for item in wanted.items()]
            for thread in threads:
                thread.start()
                if not self.here:  # two cores: side by side they would only take each other's time
                    thread.join()
            for thread in threads:
                thread.join()
        text = markdown(self.result)
        self.file.with_suffix(".md").write_text(text)
        print(f"\n{text}\nwritten: {self.file} and {self.file.with_suffix('.md').name}")
        return 0 if all(s["ok"] for s in self.result["stages"].values()) else 1

    def stage(self, name: str, limit: float) -> None:
        limit, value = min(limit, self.end - time.time()), None
        if limit < 5:
            done = {"ok": False, "seconds": 0, "tail": "not run: out of time"}
        else:
            out = self.folder / f"stage-{name}.json"
            out.unlink(missing_ok=True)
            env = {"FASTPETL_SUITE_OUT": str(out), "FASTPETL_SUITE_LIMIT": str(limit)}
            env["TRITON_INTERPRET"] = "0" if self.here else "1"
            done = stages.run([sys.executable, str(Path(__file__).resolve()), "--stage", name], limit, **env)
            if out.exists():
                value = json.loads(out.read_text())
                out.unlink()
                if isinstance(value, dict) and value.get("ok") is False:
                    done["ok"] = False
        with self.lock:
            self.result["stages"][name] = done
            if value is not None:
                self.result[name] = value
            self.file.write_text(json.dumps(self.result, indent=1) + "\n")
            how = "ok" if done["ok"] else f"FAILED\n{done['tail'][-800:]}"
            print(f"{name}: {how} ({done['seconds']} s)", flush=True)


# --- what people read -------------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    f = result["facts"]
    lines = [f"# GPU suite: {f.get('device', 'no GPU; sizes and times here mean nothing')}", ""]
    lines += [f"* {k}: {v}" for k, v in f.items() if not isinstance(v, dict)]
    lines += [f"* versions: {f['fastpetl']}"] if "fastpetl" in f else []
    lines += ["", "| stage | ok | seconds |", "|---|---|---|"]
    lines += [f"| {n} | {s['ok']} | {s['seconds']} |" for n, s in result["stages"].items()]
    wrong = [c for c in result.get("checks") or [] if not c["ok"]]
    lines += ["", f"checks: {len(result.get('checks') or [])}, failed: {len(wrong)}"]
    lines += [f"* {c}" for c in wrong[:20]]
    measured = *_ops(result.get("ops") or []), *_models(result.get("model") or [])
    return "\n".join([*lines, *measured, *_scoring(result.get("scoring") or [])]) + "\n"


def _ops(rows: list[dict]) -> list[str]:
    """Eager's time over the variant's is the ratio."""
    eager = {(r["case"], r.get("mode")): r["us"] for r in rows if r.get("variant") == "eager" and r["status"] == "ok"}
    lines = ["", "| bf16 case | mode | variant | µs | eager / this | of copy bandwidth | called from Python, µs |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        took = f"– | – | {r['status']} | –"
        if r["status"] == "ok":
            ratio = eager.get((r["case"], r["mode"]), float("nan")) / r["us"]
            took = f"{r['us']:.1f} | {ratio:.2f} | {100 * r['of_copy']:.0f} % | {r['called_us']:.1f}"
        lines.append(f"| {r['case']} | {r.get('mode', '')} | {r.get('variant', '')} | {took} |")
    return lines


def _models(rows: list[dict]) -> list[str]:
    lines = [
        "",
        "| bf16 model | variant | inference, ms | its kernels | step, ms | peak MiB | skipped MACs |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        if r.get("status", "ok") != "ok":
            lines.append(f"| {r['model']} | {r['variant']} | {r['status']} | | | | |")
            continue
        peak = "–" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
        share = "–" if not r["skipped_share_of_macs"] else f"{r['skipped_share_of_macs']:.3f}"
        kernels = "–" if r["inference_kernels_ms"] is None else f"{r['inference_kernels_ms']:.2f}"
        times = f"{r['inference_ms']:.2f} | {kernels} | {r['step_ms']:.2f}"
        lines.append(f"| {r['model']} | {r['variant']} | {times} | {peak} | {share} |")
    return lines


def _scoring(rows: list[dict]) -> list[str]:
    lines = ["", "| bf16 model | three candidates one by one, ms | in one pass, ms | ratio |", "|---|---|---|---|"]
    for r in rows:
        three, one = r["three_passes_ms"], r["one_pass_ms"]
        lines.append(f"| {r['model']} | {three:.2f} | {one:.2f} | {one / three:.2f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
