"""Builds and installs fastpetl.

`fastpetl._C` (csrc/) is one shared library: C++ CPU kernels always, CUDA kernels wherever an nvcc is found. Neither a
GPU nor a CUDA build of torch is needed to compile, link and load it. Without a C++ compiler the Python parts install.

    FASTPETL_CUDA=auto|0|1        compile csrc/cuda (default auto: when an nvcc is found)
    FASTPETL_CUDA_ARCH_LIST=...   default "80;90a;100a"; "90+PTX" embeds PTX as well
    FASTPETL_REQUIRE_EXT=1        fail instead of installing without fastpetl._C
    FASTPETL_SANITIZE=...         sanitizers of the C++ code, e.g. address,undefined; give such a build its own
                                  --build-base (tests/build/test_sanitizers.py)
    FASTPETL_TORCH_DIR=...        torch package whose headers to use (default: the torch of this environment)
    CXX, CUDA_HOME, MAX_JOBS      as usual
"""

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020b000000000000"  # the oldest libtorch whose stable ABI the bindings use: 2.11
BASE_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wno-maybe-uninitialized"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
ISA_FLAGS = {  # by the end of a file's name in csrc/cpu; which of them runs is decided at run time
    "_avx2.cpp": "-mavx2 -mfma -mf16c",
    "_avx512.cpp": AVX512,
    "_avx512bf16.cpp": AVX512 + " -mavx512bf16",
    "_amx.cpp": AVX512 + " -mavx512bf16 -mamx-tile -mamx-bf16",
}


class CannotBuild(Exception):
    """fastpetl._C cannot be built here; the message is the one line the user reads."""


def find_torch():
    """Folder and version of the torch to build against, found without importing it: pip's isolated build environment
    has no torch, but it shares sysconfig's paths with the environment that is installed into."""
    spec = importlib.util.find_spec("torch")
    places = [os.environ.get("FASTPETL_TORCH_DIR"), *((spec and spec.submodule_search_locations) or [])]
    places += [Path(sysconfig.get_path(k), "torch") for k in ("platlib", "purelib")]
    for place in filter(None, places):
        if Path(place, "include/torch/csrc/stable/library.h").exists():
            return Path(place), re.search(r"__version__ = '([^']+)'", Path(place, "version.py").read_text())[1]
    sys.exit("fastpetl: no torch >= 2.11 in this environment; first run: pip install torch==2.13.0")


def find_cxx():
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    raise CannotBuild(f"no C++ compiler (CXX={os.environ.get('CXX', 'unset')})")


def find_cuda():
    """The CUDA toolkit's folder, or None. An nvcc on PATH may be a wrapper script, so it is asked where it lives."""
    mode = os.environ.get("FASTPETL_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"fastpetl: FASTPETL_CUDA is {mode!r}, expected auto, 0 or 1")
    if mode == "0":
        return None
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        told = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", told, re.M)
        places.append(os.path.realpath(top[1].strip()) if top else Path(nvcc).resolve().parents[1])
    places += ["/usr/local/cuda", Path(sysconfig.get_path("purelib"), "nvidia/cu13")]  # the last: pip's nvcc
    for place in filter(None, places):
        if Path(place, "bin/nvcc").exists() and Path(place, "include/cuda_runtime.h").exists():
            return Path(place)
    if mode == "1":
        sys.exit("fastpetl: FASTPETL_CUDA=1, but no CUDA toolkit was found (set CUDA_HOME)")
    return None


def default_archs(cuda):
    """80;90a;100a, as far as this nvcc knows them."""
    known = subprocess.check_output([cuda / "bin/nvcc", "--list-gpu-arch"], text=True).split() if cuda else []
    return ";".join(arch for arch in ("80", "90a", "100a") if f"compute_{arch.rstrip('a')}" in known)


def gencode(archs):
    flags = []
    for arch in filter(None, re.split(r"[;, ]+", archs)):
        sm = arch.removesuffix("+PTX").removeprefix("sm_").replace(".", "")
        flags.append(f"-gencode arch=compute_{sm},code=sm_{sm}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{sm},code=compute_{sm}")
    return " ".join(flags)


def x86_flags_work(cxx):
    """Whether this is x86-64 with a compiler that knows every ISA flag; else only the portable kernels are built."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    probe = [*cxx.split(), *ISA_FLAGS["_amx.cpp"].split(), "-mf16c", "-x", "c++", "-fsyntax-only", os.devnull]
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return True
    print(f"fastpetl: {cxx} lacks the AVX-512/AMX flags (needs g++ >= 11); building the portable CPU kernels only")
    return False


def sanitizer_flags(names):
    """A finding ends the process. vptr checks would need the type information of torch's classes."""
    return f"-O1 -g1 -fsanitize={names} -fno-sanitize=vptr -fno-sanitize-recover=all" if names else ""


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildExt(build_ext):
    """Writes a ninja file with one rule per compiler and runs it. (torch's own BuildExtension refuses .cu files where
    torch has no CUDA, and adds nvcc flags that differ from machine to machine.)"""

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        must, cuda = os.environ.get("FASTPETL_REQUIRE_EXT") == "1", find_cuda()
        try:
            cxx = find_cxx()
            try:
                self.run_ninja(ext, out, cxx, cuda)
            except CannotBuild as why:
                if cuda is None or must or os.environ.get("FASTPETL_CUDA") == "1":
                    raise
                print(f"fastpetl: building without the CUDA kernels: {why}", file=sys.stderr)
                self.run_ninja(ext, out, cxx, None)
        except CannotBuild as why:
            if must:
                sys.exit(f"fastpetl: cannot build fastpetl._C: {why}")
            out.unlink(missing_ok=True)
            ext.optional = True  # setuptools then does not miss it
            print(f"fastpetl: installing the pure-Python parts only: {why}", file=sys.stderr)

    def copy_extensions_to_source(self):
        for ext in self.extensions:  # in place: an older build must not pass for this one
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def run_ninja(self, ext, out, cxx, cuda):
        torch_dir, torch_version = find_torch()
        tmp = Path(self.build_temp).resolve()
        for folder in (tmp, out.parent):
            folder.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("FASTPETL_CUDA_ARCH_LIST") or default_archs(cuda)
        ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        with open(tmp / "lock", "w") as lock:  # two builds of one checkout would write the same objects
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_if_changed(tmp / "fastpetl_config.h", config_header(torch_version, cuda, archs))
            write_if_changed(tmp / "build.ninja", ninja_file(ext, out, tmp, cxx, torch_dir, cuda, archs))
            if subprocess.run([*command, "-C", str(tmp)]).returncode != 0:
                raise CannotBuild("compiling csrc/ failed, see above")


def config_header(torch_version, cuda, archs):
    """What fastpetl._C.build_info() reports. A header, because quoting `80;90a` through -D breaks the shell."""
    lines = [f'#define FASTPETL_TORCH "{torch_version}"']
    if cuda:
        said = subprocess.check_output([cuda / "bin/nvcc", "--version"], text=True)
        lines.append(f'#define FASTPETL_NVCC "{re.search(r"V([0-9.]+)", said)[1]}"')
        lines.append(f'#define FASTPETL_CUDA_ARCHS "{archs}"')
    return "\n".join(lines) + "\n"


def ninja_file(ext, out, tmp, cxx, torch_dir, cuda, archs):
    import pybind11

    x86 = x86_flags_work(cxx)
    defines = f"-DFASTPETL_X86={int(x86)}" + (" -DFASTPETL_WITH_CUDA=1" if cuda else "")
    include = f"-I{ROOT / 'csrc'} -I{tmp}"
    stable = f"-DTORCH_TARGET_VERSION={STABLE_ABI} -isystem {torch_dir / 'include'}"
    # pybind11's headers without torch's: torch 2.11 ships a pybind11 that refuses TORCH_TARGET_VERSION
    pybind = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    libs = f"-L{torch_dir / 'lib'} -ltorch_cpu"
    checked = sanitizer_flags(os.environ.get("FASTPETL_SANITIZE"))
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {BASE_FLAGS} {checked} {defines} {include} $flags -c $in -o $out",
        "  description = c++ $in\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared {checked} $in -o $out $libs\n  description = link $out",
    ]
    if cuda:
        nvcc = f"{cuda / 'bin/nvcc'} -MD -MF $out.d -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden"
        lines += [f"rule nvcc\n  command = {nvcc} {include} {gencode(archs)} -c $in -o $out"]
        lines += ["  description = nvcc $in\n  depfile = $out.d\n  deps = gcc"]
        static = [cuda / lib / "libcudart_static.a" for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
        runtime = next((p for p in static if p.exists()), None)
        if runtime is None:
            raise CannotBuild(f"{cuda} has no libcudart_static.a")
        libs += f" {runtime} -ldl -lrt -lpthread"  # static: nothing to find where torch has no CUDA
    objects = []
    # ISA files last: of an inline function that several objects hold, the linker keeps the first one it meets
    for source in sorted(ext.sources, key=lambda s: (s.endswith(tuple(ISA_FLAGS)), s)):
        name = Path(source).name
        isa = next((flags for end, flags in ISA_FLAGS.items() if name.endswith(end)), "")
        if (isa and not x86) or (source.endswith(".cu") and not cuda):
            continue
        objects.append(str(tmp / (source.replace("/", "_") + ".o")))
        if source.endswith(".cu"):
            lines.append(f"build {objects[-1]}: nvcc {ROOT / source}")
            continue
        binding = "csrc/bind/" in source
        flags = (pybind if name == "module.cpp" else stable) if binding else isa
        lines.append(f"build {objects[-1]}: cxx {ROOT / source}\n  flags = {flags}")
    lines.append(f"build {out}: link {' '.join(objects)}\n  libs = {libs}")
    return "\n".join(lines) + "\n"


class BuildPy(build_py):
    """The Triton kernels live in the top-level kernels/; a wheel carries them inside fastpetl/kernels/. In a checkout
    fastpetl/kernels/__init__.py points its __path__ at the top-level folder instead."""

    def triton_sources(self):
        top = ROOT / "kernels"
        return [(p, Path(self.build_lib, "fastpetl/kernels", p.relative_to(top))) for p in sorted(top.rglob("*.py"))]

    def run(self):
        super().run()
        for source, target in [] if self.editable_mode else self.triton_sources():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_source_files(self):
        return super().get_source_files() + [os.path.relpath(source, ROOT) for source, _ in self.triton_sources()]

    def get_outputs(self, include_bytecode=True):
        copies = [] if self.editable_mode else [str(target) for _, target in self.triton_sources()]
        return super().get_outputs(include_bytecode) + copies


def csrc(*suffixes):
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)


models = ["transformers>=5.0", "safetensors>=0.5"]
demo = [*models, "easy-vqa>=1.0", "matplotlib>=3.8", "tqdm>=4.60", "pillow>=10"]
triton = ["triton>=3.6"]
setup(
    name="fastpetl",
    version=re.search(r'__version__ = "([^"]+)"', (ROOT / "fastpetl/_version.py").read_text())[1],
    description="Parameter-efficient transfer learning of vision-language models, as cheap in time as in parameters",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["fastpetl", "fastpetl.*"]),
    package_data={"fastpetl": ["demo/assets/*", "tuned.json"]},
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        "triton": triton,
        "models": models,
        "demo": demo,
        "test": [*demo, *triton, "pytest>=8", "hypothesis>=6", "pybind11>=2.13", "ninja"],
    },
    ext_modules=[Extension("fastpetl._C", csrc(".cpp", ".cu"), depends=csrc(".h", ".cuh"))],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
