"""`import fastpetl` needs neither Triton nor transformers and asks no device anything."""

import subprocess
import sys

PUBLIC = ["ops", "nn", "patching", "methods", "skip", "backends", "spec", "info", "kernels"]

SCRIPT = """
import sys, importlib
blocked = {blocked!r}
for name in blocked:
    sys.modules[name] = None  # importing it raises ImportError, looking for it finds nothing
import torch

def refuse(*args, **kwargs):
    raise AssertionError("a device was queried")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
import fastpetl
assert not sys.modules.get("triton") and not sys.modules.get("torch._dynamo"), "import fastpetl is slow"
for name in {public!r}:
    importlib.import_module("fastpetl." + name)
loaded = [name for name in ("transformers", "easy_vqa", "matplotlib") if sys.modules.get(name)]
assert not loaded, loaded
x, w = torch.ones(2, 8), torch.ones(4, 8)
y = fastpetl.ops.adapter(x, w, None, w.T.contiguous(), None, residuals=(x,))
assert torch.allclose(y, x + 32), y
"""


def run(blocked):
    script = SCRIPT.format(blocked=blocked, public=PUBLIC)
    done = subprocess.run([sys.executable, "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


def test_import_queries_no_device_and_loads_nothing_big():
    run([])


def test_works_without_triton_and_transformers():
    run(["triton", "transformers", "safetensors", "easy_vqa", "matplotlib"])


def test_works_without_the_compiled_module():
    run(["fastpetl._C", "triton", "transformers"])
