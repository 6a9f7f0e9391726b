"""Where this machine's CUDA toolkit and Triton's binary tools are; None where there is none."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path


def include_dir():
    """The folder with cuda_runtime.h, or None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        told = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", told, re.M)
        homes.insert(0, os.path.realpath(top[1].strip()) if top else Path(nvcc).resolve().parents[1])
    folders = (Path(home, "include") for home in homes if home)
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


def cuobjdump():
    """The cuobjdump of the triton wheel, or None."""
    spec = importlib.util.find_spec("triton")
    exe = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return exe if exe and exe.exists() else None
