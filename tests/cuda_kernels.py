"""The CUDA kernels of csrc/cuda as CPU functions: compiled as C++ with tests/build/cuda_host.h."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

from cuda_toolkit import include_dir

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
WHY_NOT = (
    "no CUDA toolkit: its headers define __half and __nv_bfloat16"
    if include_dir() is None
    else f"no C++ compiler ({CXX})"
    if shutil.which(CXX) is None
    else ""
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
_INTS = ("d", "r", "activation", "add_x", "tail", "device", "warps_m")


def _structure(name, pointers, ints, floats):
    fields = [*[(p, ctypes.c_void_p) for p in pointers], ("rows", ctypes.c_int64)]
    fields += [*[(i, ctypes.c_int) for i in ints], *[(f, ctypes.c_float) for f in floats]]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# Fields in the order of csrc/cuda/fastpetl_cuda.h.
FORWARD_IN = "x w_down b_down w_up b_up norm_weight norm_bias res1 res2 tail_weight tail_bias".split()
SiteForward = _structure(
    "SiteForward", [*FORWARD_IN, "s", "n", "z", "stats", "tail_stats"], _INTS, ("eps", "tail_eps", "scale")
)
BACKWARD_IN = "g_s g_n s tail_weight x z w_down w_up norm_weight stats tail_stats".split()
SiteBackward = _structure("SiteBackward", [*BACKWARD_IN, "g", "dx", "dz", "h", "tail_partial"], _INTS, ("scale",))


def compile_host(target, *flags, sources=None, shared=True):
    """Compiles csrc/cuda with g++ and the shim; `sources` in place of csrc/cuda/*.cu."""
    command = [CXX, "-std=c++17", "-O1", "-w", "-fPIC", "-include", ROOT / "tests/build/cuda_host.h"]
    command += ["-isystem", include_dir(), f"-I{ROOT / 'csrc'}", *(["-shared"] if shared else []), *flags]
    command += ["-o", target, "-pthread", "-x", "c++", *(sources or SOURCES)]
    subprocess.run([*map(str, command)], check=True)
    return target


def load(target):
    library = ctypes.CDLL(str(target))
    return {
        name: getattr(library, f"fastpetl_cuda_{name}")
        for name in ("site_forward", "site_backward", "site_block_rows", "gather_rows", "scatter_rows", "add_rows")
        if hasattr(library, f"fastpetl_cuda_{name}")
    }


def pointer(t):
    return None if t is None or t.numel() == 0 else t.data_ptr()


def guarded(shape, dtype, device="cpu"):
    """(A NaN buffer of that shape, a check that the canary row behind it is untouched)."""
    whole = torch.full((shape[0] + 1, *shape[1:]), float("nan"), dtype=dtype)
    whole[-1] = 7.0

    def check():
        assert (whole[-1] == 7.0).all(), "wrote past the last row"

    return whole[:-1], check


def site_forward(kernels, t, *, emit=3, save=True, activation=1, add_x=True, tail=0, eps=1e-5, tail_eps=1e-6, scale=1.0,
                 warps_m=0):  # fmt: skip
    """Runs the forward kernel on the operands `t` (a dict); what it wrote, as a dict of s, n, z, stats, tail_stats."""
    (rows, d), r, dtype = t["x"].shape, t["w_down"].shape[0], t["x"].dtype
    made = {}
    if emit & 1 or not tail:
        made["s"] = guarded((rows, d), dtype)
    if tail:
        made["n"] = guarded((rows, d), dtype)
    if save:
        made["z"] = guarded((rows, r), dtype)
        if "norm_weight" in t:
            made["stats"] = guarded((rows, 2), torch.float32)
        if tail:
            made["tail_stats"] = guarded((rows, 2), torch.float32)
    args = SiteForward(
        rows=rows, d=d, r=r, activation=activation, add_x=add_x, tail=tail, warps_m=warps_m, eps=eps, tail_eps=tail_eps,
        scale=scale, **{k: pointer(v) for k, v in t.items()}, **{k: pointer(v) for k, (v, _) in made.items()},
    )  # fmt: skip
    error = kernels["site_forward"](ctypes.byref(args), DTYPES[dtype], None)
    assert error == 0, f"CUDA error {error}"
    for _, check in made.values():
        check()
    return {k: v for k, (v, _) in made.items()}


def site_backward(kernels, t, *, want=7, activation=1, add_x=True, tail=0, scale=1.0, warps_m=0):
    """Runs the backward kernel on `t`: a dict of g, dx, dz, h, tail_partial. want: 1 dx, 2 h, 4 tail_partial."""
    (rows, r), d, dtype = t["z"].shape, t["w_down"].shape[1], t["z"].dtype
    args = SiteBackward(
        rows=rows, d=d, r=r, activation=activation, add_x=add_x, tail=tail, warps_m=warps_m, scale=scale,
        **{k: pointer(v) for k, v in t.items()},
    )  # fmt: skip
    made = {"dz": guarded((rows, r), dtype)}
    if t.get("g_n") is not None:
        made["g"] = guarded((rows, d), dtype)
        if want & 4:
            block = kernels["site_block_rows"](ctypes.byref(args), DTYPES[dtype])
            made["tail_partial"] = guarded((-(-rows // block), 2, d), torch.float32)
    if want & 1:
        made["dx"] = guarded((rows, d), dtype)
    if want & 2:
        made["h"] = guarded((rows, r), dtype)
    for name, (tensor, _) in made.items():
        setattr(args, name, pointer(tensor))
    error = kernels["site_backward"](ctypes.byref(args), DTYPES[dtype], None)
    assert error == 0, f"CUDA error {error}"
    for _, check in made.values():
        check()
    return {k: v for k, (v, _) in made.items()}
