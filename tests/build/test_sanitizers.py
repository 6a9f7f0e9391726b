"""The C++ CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: by themselves, and in the op tests."""

import ast
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("sanitize_cpu.cpp")
CXX = os.environ.get("CXX", "g++")
X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def sanitizer_library():
    """The preloadable AddressSanitizer of this compiler, or None."""
    if shutil.which(CXX) is None:
        return None
    said = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return said if Path(said).is_absolute() else None


pytestmark = pytest.mark.skipif(sanitizer_library() is None, reason=f"{CXX} has no AddressSanitizer")


def isa_flags():
    """ISA_FLAGS of setup.py, which cannot be imported."""
    names, tree = {}, ast.parse((ROOT / "setup.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("AVX512", "ISA_FLAGS"):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), names)
    return names["ISA_FLAGS"]


def build(folder, x86):
    """sanitize_cpu with all instruction sets, or with the portable one alone, whose -O1 takes longer than it saves."""
    level = "-O1" if x86 else "-Og"
    command = [CXX, "-std=c++17", level, "-g1", "-fno-math-errno", *SANITIZE, f"-I{ROOT / 'csrc'}"]
    command += [f"-DFASTPETL_X86={int(x86)}", "-c"]
    sources = {ROOT / "csrc/cpu/dispatch.cpp": "", ROOT / "csrc/cpu/isa_portable.cpp": "", DRIVER: ""}
    for end, flags in isa_flags().items() if x86 else ():
        sources[ROOT / f"csrc/cpu/isa{end}"] = flags
    objects = [folder / f"{source.stem}.o" for source in sources]
    for (source, flags), target in zip(sources.items(), objects, strict=True):
        subprocess.run([*command, *flags.split(), source, "-o", target], check=True)
    subprocess.run([CXX, *SANITIZE, *objects, "-o", folder / "sanitize_cpu", "-lpthread"], check=True)
    return folder / "sanitize_cpu"


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    return build(tmp_path_factory.mktemp("portable"), x86=False)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return build(tmp_path_factory.mktemp("all"), x86=X86)


def run(program, *arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr[-4000:]


def test_the_portable_kernels_touch_only_what_is_theirs(portable):
    code, said = run(portable, "heap")
    assert code == 0 and "cases on portable" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("where", ["heap", "fence"])
def test_every_instruction_set_touches_only_what_is_its(everything, where):
    code, said = run(everything, where)
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("where", ["heap", "fence"])
def test_one_element_too_few_is_noticed_in_every_buffer(everything, where):
    """AVX-512's masked loads and stores are invisible to the sanitizer: for them there is the fence."""
    code, said = run(everything, where, "plant", "portable")
    assert code == 0, said
    if where == "fence":
        code, said = run(everything, where, "plant", "avx512")
        assert code in (0, 2), said  # 2: not on this CPU


@pytest.mark.slow
def test_the_op_tests_run_clean_in_a_sanitized_build(tmp_path):
    """A whole fastpetl._C with both sanitizers, loaded into a Python that has the sanitizer's library preloaded."""
    lib = tmp_path / "lib"
    environment = os.environ | {"FASTPETL_SANITIZE": "address,undefined", "FASTPETL_CUDA": "0"}
    environment["FASTPETL_REQUIRE_EXT"] = "1"
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "--build-lib", lib]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    stdcxx = subprocess.check_output([CXX, "-print-file-name=libstdc++.so"], text=True).strip()
    environment["LD_PRELOAD"] = f"{sanitizer_library()} {stdcxx}"
    environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's and torch's own
    inside = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    inside += ["-o", "pythonpath=tests", "-m", "not slow", "-k", "cpp or test_cpu", ROOT / "tests/ops"]
    done = subprocess.run([*map(str, inside)], cwd=lib, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    assert str(lib) in loaded_from(lib, environment)


def loaded_from(lib, environment):
    said = "import fastpetl._build as b; print(b.extension()[0].__file__)"
    return subprocess.run([sys.executable, "-c", said], cwd=lib, env=environment, capture_output=True, text=True).stdout
