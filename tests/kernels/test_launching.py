"""The second launch goes straight to the compiled kernel, and only where that is the kernel Triton would have chosen.

In a process of its own: Triton compiles there, for a device that is made up and only takes notes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SCRIPT = """
import json, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CALLS = []

class Utils:
    def load_binary(self, name, *rest):
        return name, name, 32, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class Launcher:
    def __init__(self, source, metadata):
        self.constants = {source.fn.arg_names[i[0]]: v for i, v in source.constants.items()}
        self.attributes = sorted(str(v) for v in source.attrs.values())
        self.signature = dict(source.signature)
    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        args[:2] = [a if a is None else a % 16 for a in args[:2]]
        CALLS.append([[x, y, z], stream, args, self.signature, self.attributes])

class Device:
    utils, launcher_cls = Utils(), Launcher
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 5)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_device_capability = staticmethod(lambda device: (9, 0))
    map_python_to_cpp_type = staticmethod(str)

driver.set_active(Device())
torch.cuda.current_device = lambda: 0
torch._C._cuda_getCurrentRawStream = lambda device: 5
from fastpetl.kernels import launching
from launching_kernel import add

front, back = [], []
run, getitem = type(add).run, triton.compiler.CompiledKernel.__getitem__
def counted(self, *args, **kwargs):
    front.append(1)
    return run(self, *args, **kwargs)
type(add).run = counted
def heard(self, grid):
    back.append(1)
    return getitem(self, grid)
triton.compiler.CompiledKernel.__getitem__ = heard

x, half = torch.zeros(40), torch.zeros(40, dtype=torch.float16)
found = []
def launch(what, x, y, n, scale=1.0, block=16):
    front.clear(), back.clear(), CALLS.clear()
    launching.launch(add, (3,), x, y, n, scale, BLOCK=block, num_warps=1)
    found.append([what, len(front) + 2 * len(back), *CALLS[-1]])

launch("first", x, x, 40)
launch("again", x, x, 41)
launch("another scale", x, x, 41, 0.5)
launch("misaligned", x[1:], x, 41)
launch("misaligned again", x[1:], x, 41)
launch("aligned after it", x, x, 41)
launch("None", x, None, 41)
launch("None again", x, None, 41)
launch("another dtype", half, half, 41)
launch("another constant", x, x, 41, block=32)
launch("64 bits", x, x, 1 << 31)
launch("32 bits after it", x, x, 41)
hook = lambda metadata: None
triton.knobs.runtime.launch_exit_hook.add(hook)
launch("with a profiler", x, x, 41)
triton.knobs.runtime.launch_exit_hook.remove(hook)
launch("without it", x, x, 41)
triton.knobs.runtime.launch_enter_hook = hook
launch("with one in the chain's place", x, x, 41)
print(json.dumps(found))
"""

KERNEL = """
import triton
import triton.language as tl

@triton.jit(do_not_specialize=["n"])
def add(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    if y_ptr is not None:
        x += tl.load(y_ptr + i, mask=i < n)
    tl.store(x_ptr + i, x * scale, mask=i < n)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launching")
    (folder / "launching_kernel.py").write_text(KERNEL)
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    env["PYTHONPATH"] = os.pathsep.join((str(folder), str(Path(__file__).parents[2])))
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return {what: rest for what, *rest in json.loads(done.stdout.strip().splitlines()[-1])}


@pytest.mark.parametrize(
    ("what", "through_triton"),
    [("first", 1), ("again", 0), ("another scale", 0), ("misaligned", 1), ("misaligned again", 1)]
    + [("aligned after it", 0), ("None", 1), ("None again", 0), ("another dtype", 1), ("another constant", 1)]
    + [("64 bits", 1), ("32 bits after it", 0), ("without it", 0)],
)
def test_who_finds_the_kernel(found, what, through_triton):
    """1: Triton's front door, 0: nobody but the compiled kernel's launcher."""
    assert found[what][0] == through_triton


def test_the_direct_launch_passes_on_what_triton_passes(found):
    (_, grid, stream, args, *kind), (_, *first) = found["again"], found["first"]
    assert grid == first[0] == [3, 1, 1] and stream == first[1] == 5
    assert args == [0, 0, 41, 1.0, 16] and first[2] == [0, 0, 40, 1.0, 16]
    assert kind == first[3:]
    assert found["another scale"][3] == [0, 0, 41, 0.5, 16]
    assert found["None again"][1:] == found["None"][1:]


def test_each_kind_of_argument_has_its_kernel(found):
    kinds = {what: str(found[what][4:]) for what in ("first", "misaligned", "None", "another dtype", "64 bits")}
    assert len(set(kinds.values())) == len(kinds)
    assert found["aligned after it"][4:] == found["32 bits after it"][4:] == found["first"][4:]


def test_a_profilers_hook_is_heard(found):
    for what in ("with a profiler", "with one in the chain's place"):  # 2: by the compiled kernel's own door
        assert found[what][:4] == [2, [3, 1, 1], 5, [0, 0, 41, 1.0, 16]]
