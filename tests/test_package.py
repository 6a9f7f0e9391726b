"""The package itself: lazy public names, imports that need nothing, and the command line."""

import subprocess
import sys

import pytest

import fastpetl
from fastpetl.__main__ import COMMANDS, main

SETTLED = (
    "patch",
    "unpatch",
    "report",
    "attach",
    "detach",
    "blocks",
    "skip",
    "count",
    "save",
    "load",
    "DASConfig",
    "ops",
)


@pytest.mark.parametrize("name", SETTLED)
def test_public_names(name):
    value = getattr(fastpetl, name)
    assert name in dir(fastpetl) and name in fastpetl.__all__ + ["ops"]
    assert name == "ops" or callable(value)


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'fastpetl' has no attribute 'magic'"):
        fastpetl.magic  # noqa: B018


def test_callable_modules_are_modules_too():
    import inspect

    from fastpetl.skip.plan import SkipPlan

    assert fastpetl.skip.SkipPlan is SkipPlan is fastpetl.SkipPlan
    assert list(inspect.signature(fastpetl.skip).parameters) == ["model", "mask_or_plan", "shortcut", "capacity"]
    assert list(inspect.signature(fastpetl.count).parameters) == ["model", "inputs"]


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "triton", "safetensors"):
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
sys.modules["fastpetl._C"] = None  # as if it had not been built
import fastpetl
assert "torch" not in sys.modules
import torch
torch.cuda.init = torch.cuda._lazy_init = lambda *a: (_ for _ in ()).throw(AssertionError("a device was queried"))
for name in "patch unpatch report attach detach DASConfig blocks skip prune das count save load".split():
    getattr(fastpetl, name)
model = torch.nn.Sequential(fastpetl.nn.BottleneckAdapter(8, 4))
want = model(torch.ones(2, 8))
fastpetl.patch(model, strict=True)
assert torch.allclose(model(torch.ones(2, 8)), want, atol=1e-6)
print(fastpetl.report(model))
"""


def test_import_needs_nothing():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adapter: reference" in done.stdout and "cpp: fastpetl._C" in done.stdout


def test_command_line(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert fastpetl.__version__ in capsys.readouterr().out
    assert main(["fly"]) == 2
    assert "unknown command 'fly', expected one of info, demo, count, search, bench" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["count", "--help"])
    assert stop.value.code == 0
