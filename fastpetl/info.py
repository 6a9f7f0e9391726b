"""`python -m fastpetl info`: what was built, what works on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform


def gather() -> dict:
    """Semantics: everything `info` prints, as plain JSON values. Keys: fastpetl (its version), versions, build, cpu,
    devices, ops (one row per op and backend: op, backend, available, reason).
    """
    import torch

    from fastpetl import __version__, backends
    from fastpetl._build import build_info, extension

    module, reason = extension()
    cpu = {"threads": torch.get_num_threads(), "isa": None, "available": []}
    if module:
        cpu.update(isa=module.cpu_isa(), available=list(module.cpu_isas()))
    rows = [dict(zip(("op", "backend", "available", "reason"), row, strict=True)) for row in backends.availability()]
    return {
        "fastpetl": __version__,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_versions()},
        "build": {"built": module is not None, "reason": reason, **build_info()},
        "cpu": cpu,
        "devices": _cuda_devices(torch),
        "ops": rows,
    }


def _versions() -> dict[str, str | None]:
    versions = dict.fromkeys(("triton", "transformers", "numpy"))
    for name in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _cuda_devices(torch) -> list[str]:
    if not torch.cuda.is_available():
        return []
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return names


def _build_lines(build: dict, running: str | None) -> list[tuple[str, str]]:
    if not build["built"]:
        return [("compiled part", f"missing: {build['reason']}")]
    cuda = "not built (no nvcc was found, or FASTPETL_CUDA=0)"
    if build["cuda"]:
        cuda = f"built by nvcc {build['nvcc']} for {build['cuda_archs']}; auto takes it where tuned.json says so"
    return [
        ("compiled part", f"built by {build['compiler']} against torch {build['torch_headers']}, running {running}"),
        ("CUDA C++", cuda),
    ]


def render(info: dict) -> str:
    """Semantics: `gather()`'s result as text for people."""
    cpu = info["cpu"]
    isa = f"{cpu['isa']} in use, available: {', '.join(cpu['available'])}" if cpu["isa"] else "no compiled kernels"
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in info["versions"].items())
    lines = [("fastpetl", info["fastpetl"]), ("versions", versions)]
    lines += _build_lines(info["build"], info["versions"]["torch"])
    lines.append(("CPU kernels", f"{isa}; {cpu['threads']} threads"))
    lines.append(("CUDA devices", ", ".join(info["devices"]) or "none"))
    text = [f"{name + ':':<15} {value}" for name, value in lines] + [""]
    for row in info["ops"]:
        mark = "yes" if row["available"] else "no"
        text.append(f"{row['op']:<10} {row['backend']:<10} {mark:<4} {row['reason']}")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """Semantics: prints what was built and what works here; --json prints the same as JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastpetl info",
        description="What was built, which backends of which ops work on this machine, and why the rest does not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    info = gather()
    print(json.dumps(info, indent=2) if args.json else render(info))
    return 0
