"""`python -m fastpetl info`."""

import json

import torch

from fastpetl import _build, backends, info


def test_json_holds_every_op_and_backend_with_a_reason(capsys):
    assert info.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["versions"]["torch"] == torch.__version__
    expected = {(op, name) for op, names in backends.BACKENDS.items() for name in names}
    assert {(row["op"], row["backend"]) for row in said["ops"]} == expected
    assert all(row["reason"] for row in said["ops"])
    assert said["build"]["built"] == (_build.extension()[0] is not None)
    if said["build"]["built"]:
        assert said["cpu"]["isa"] in said["cpu"]["available"]


def test_text_says_why_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(_build, "extension", lambda: (None, "no compiler on Tuesdays"))
    monkeypatch.setattr(_build, "build_info", dict)
    monkeypatch.setattr(backends, "availability", lambda: [("adapter", "cpp", False, "see above")])
    assert info.main([]) == 0
    said = capsys.readouterr().out
    assert "compiled part:  missing: no compiler on Tuesdays" in said
    assert "no compiled kernels" in said
    assert said.endswith("adapter    cpp        no   see above\n")


def test_text_names_compiler_and_cuda(monkeypatch):
    build = {"built": True, "compiler": "g++ 12", "torch_headers": "2.13.0", "cuda": False}
    lines = dict(info._build_lines(build, "2.11.0"))
    assert lines["compiled part"] == "built by g++ 12 against torch 2.13.0, running 2.11.0"
    assert lines["CUDA C++"].startswith("not built")
    build |= {"cuda": True, "nvcc": "13.0", "cuda_archs": "80;90a"}
    said = dict(info._build_lines(build, "2.11.0"))["CUDA C++"]
    assert "built by nvcc 13.0 for 80;90a; auto takes it where tuned.json says so" in said
