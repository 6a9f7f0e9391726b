"""What is inside the compiled module: CUDA images, registrations, and no instruction an older CPU cannot run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cuda_toolkit import cuobjdump
from fastpetl._build import build_info, extension

ROOT = Path(__file__).resolve().parents[2]
BUILT, WHY_NOT = extension()
pytestmark = pytest.mark.skipif(BUILT is None, reason=WHY_NOT)
ISA_OBJECT = re.compile(r"_(avx2|avx512|amx)\.cpp\.o$")


CUDA_OPS = ("adapter_forward", "site_forward", "site_backward", "gather_rows", "scatter_rows", "add_rows")


def test_cuda_ops_are_registered_if_and_only_if_built_with_cuda():
    registered = {hasattr(torch.ops.fastpetl, f"cuda_{op}") for op in CUDA_OPS}
    assert registered == {build_info()["cuda"]}
    if registered == {True}:
        for op in CUDA_OPS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpetl::cuda_{op}", "CUDA")
        with pytest.raises(NotImplementedError, match="CPU"):  # a CPU tensor never reaches the CUDA kernel
            x = torch.zeros(1, 8)
            torch.ops.fastpetl.cuda_adapter_forward(x, x, None, x.T, *[None] * 5, True, 1e-5, 1, 1.0, False)


@pytest.mark.parametrize("op", ["adapter_forward", "site_forward"])
def test_cuda_and_cpu_have_one_schema(op):
    if not build_info()["cuda"]:
        pytest.skip("built without CUDA")
    if not hasattr(torch.ops.fastpetl, f"cpu_{op}"):
        pytest.skip(f"built without cpu_{op}")
    cpu, cuda = (str(getattr(torch.ops.fastpetl, f"{d}_{op}").default._schema) for d in ("cpu", "cuda"))
    assert cpu.replace("cpu_", "cuda_") == cuda


def test_cuda_kernels_use_no_stack_and_no_local_memory():
    """A spill shows as STACK or LOCAL bytes of an image embedded in the module."""
    if not build_info()["cuda"]:
        pytest.skip("built without CUDA")
    if cuobjdump() is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    said = subprocess.check_output([cuobjdump(), "--dump-resource-usage", BUILT.__file__], text=True)
    archs = set(re.findall(r"^arch = sm_(\w+)", said, re.M))
    assert archs == {arch.removesuffix("+PTX") for arch in re.split("[;, ]+", build_info()["cuda_archs"])}
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert len(kernels) >= 19 * len(
        archs
    )  # the site's two directions in three dtypes and two block shapes; seven of rows
    assert [kernel for kernel in kernels if kernel[2] != "0" or kernel[3] != "0"] == []


@pytest.mark.slow  # in make test: stack and local memory of the same kernels
def test_half_precision_sites_run_on_tensor_cores():
    """mma.sync, ldmatrix and cp.async survive compilation in every fp16 and bf16 site kernel; fp32 has no tf32."""
    if not build_info()["cuda"]:
        pytest.skip("built without CUDA")
    if cuobjdump() is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    environment = {**os.environ, "PATH": f"{cuobjdump().parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    said = subprocess.check_output([cuobjdump(), "-sass", BUILT.__file__], text=True, env=environment)
    kernels = re.findall(r"Function : (\S*site_(?:for|back)ward\S*)(.*?)(?=Function :|\Z)", said, re.S)
    assert len(kernels) == 12 * len(re.split("[;, ]+", build_info()["cuda_archs"]))
    for name, code in kernels:
        found = {what for what in ("HMMA", "LDSM", "LDGSTS") if what in code}
        half = "__half" in name or "__nv_bfloat16" in name
        assert found == ({"HMMA", "LDSM", "LDGSTS"} if half else {"LDGSTS"}), name


def test_no_object_shares_code_with_an_isa_object():
    """An inline function that two objects hold is kept once; kept from an AVX-512 object it would crash older CPUs."""
    objects = sorted(ROOT.glob("build/temp.*/csrc_*.cpp.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files in build/ (installed, not built in place), or no nm")
    held = {}
    for path in objects:
        said = subprocess.check_output(["nm", "-C", "--defined-only", path], text=True)
        for name in re.findall(r"^\S+ [Ww] (.*)$", said, re.M):
            held.setdefault(name, []).append(path.name)
    isa_objects = [path.name for path in objects if ISA_OBJECT.search(path.name)]
    assert isa_objects or not build_info()["x86"]
    shared = {name: paths for name, paths in held.items() if len(paths) > 1 and set(paths) & set(isa_objects)}
    assert shared == {}
