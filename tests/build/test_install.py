"""setup.py: wheels, installs without a compiler, and the compiled module that comes out."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastpetl._build import build_info, extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["setup.py", "pyproject.toml", "LICENSE", "csrc", "kernels", "fastpetl"]
HAS_CXX = any(shutil.which(name) for name in (os.environ.get("CXX") or "c++ g++ clang++").split())
needs_cxx = pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
BUILT, WHY_NOT = extension()

# Runs outside the checkout, on what was installed. Patching must change no number of a ViLT with random adapters.
USE_VILT = """
import sys, torch, fastpetl, fastpetl.kernels, fastpetl._build
from transformers import ViltConfig, ViltForQuestionAnswering
site = sys.argv[1]
assert fastpetl.__file__.startswith(site), fastpetl.__file__
assert all(path.startswith(site) for path in fastpetl.kernels.__path__), fastpetl.kernels.__path__
torch.manual_seed(0)
sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
config = ViltConfig(**sizes, image_size=64, patch_size=32, vocab_size=50, num_labels=3)
model = fastpetl.attach(ViltForQuestionAnswering(config).eval(), fastpetl.DASConfig(bottleneck=8), patch=False)
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    inputs = dict(input_ids=torch.randint(50, (2, 7)), pixel_values=torch.randn(2, 3, 64, 64))
    want = model(**inputs).logits
    fastpetl.patch(model)
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
assert any(row.status == 'patched' for row in fastpetl.report(model).rows), fastpetl.report(model)
print("built" if fastpetl._build.extension()[0] else fastpetl._build.extension()[1])
"""


def python(*args, cwd=ROOT, env=None, check=True):
    """Runs this interpreter on args; both output streams together as text."""
    environ = {key: value for key, value in os.environ.items() if key not in ("CXX", "FASTPETL_REQUIRE_EXT")}
    environ |= {"MAX_JOBS": "2", **(env or {})}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or done.returncode == 0, done.stdout
    return done


def build(source, target, env, *more, check=True):
    """`setup.py build` of the checkout `source` into target/lib, without touching source/build."""
    command = ["setup.py", "-q", "build", "--build-lib", target / "lib", "--build-temp", target / "temp", *more]
    return python(*command, cwd=source, env=env, check=check)


def copy_checkout(target):
    """What a build reads, without anything that was built."""
    target.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        more = {"ignore": shutil.ignore_patterns("*.so", "__pycache__")} if copy is shutil.copytree else {}
        copy(ROOT / name, target / name, **more)
    return target


def use_vilt(wheel, tmp_path):
    pytest.importorskip("transformers")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return python("-c", USE_VILT, tmp_path / "site", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}).stdout


def test_wheel_works_outside_the_checkout(tmp_path):
    """The wheel of this checkout, relinked from the objects that are already built."""
    lib, dist = tmp_path / "lib", tmp_path / "dist"
    python("setup.py", "-q", "build", "--build-lib", lib, "bdist_wheel", "-d", dist, "--bdist-dir", tmp_path / "bdist")
    [wheel] = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastpetl/kernels/adapter.py" in names and "fastpetl/demo/assets/vocab.txt" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "csrc/"))]
    said = use_vilt(wheel, tmp_path)
    assert said.split()[-1] == "built" or not BUILT, said


@pytest.mark.slow
@needs_cxx
def test_pip_wheel_from_a_clean_checkout(tmp_path):
    """`pip wheel` compiles everything anew, through the PEP 517 entry point."""
    source = copy_checkout(tmp_path / "checkout")
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", source)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    assert use_vilt(wheel, tmp_path).split()[-1] == "built"


def test_sdist_holds_what_a_build_needs(tmp_path):
    python("setup.py", "-q", "sdist", "-d", tmp_path, "--formats", "zip")
    [archive] = tmp_path.glob("*.zip")
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    needed = [path for suffix in ("cpp", "h", "cu", "cuh", "py") for path in ROOT.glob(f"[ck]*/**/*.{suffix}")]
    assert len(needed) > 10
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_no_compiler_installs_the_python_parts_and_says_one_line(tmp_path):
    said = build(ROOT, tmp_path, {"CXX": "/nonexistent"}).stdout
    lines = [line for line in said.splitlines() if line.startswith("fastpetl:")]
    assert lines == ["fastpetl: installing the pure-Python parts only: no C++ compiler (CXX=/nonexistent)"]
    assert (tmp_path / "lib/fastpetl/__init__.py").exists()
    assert not list((tmp_path / "lib").rglob("_C*"))
    info = python("-m", "fastpetl", "info", cwd=tmp_path / "lib").stdout
    assert re.search(r"compiled part: +missing: fastpetl._C is not built", info), info


def test_no_compiler_is_an_error_where_the_extension_is_required(tmp_path):
    done = build(ROOT, tmp_path, {"CXX": "/nonexistent", "FASTPETL_REQUIRE_EXT": "1"}, check=False)
    assert done.returncode != 0
    assert "fastpetl: cannot build fastpetl._C: no C++ compiler (CXX=/nonexistent)" in done.stdout


@needs_cxx
def test_failed_compile_leaves_no_older_module_behind(tmp_path):
    source = copy_checkout(tmp_path / "checkout")
    shutil.rmtree(source / "csrc")
    (source / "csrc/bind").mkdir(parents=True)
    (source / "csrc/bind/module.cpp").write_text("#error broken on purpose\n")
    suffix = python("-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").stdout.strip()
    stale = source / f"fastpetl/_C{suffix}"
    stale.write_bytes(b"an older build")
    said = python("setup.py", "-q", "build_ext", "--inplace", cwd=source, env={"FASTPETL_CUDA": "0"}).stdout
    assert "pure-Python parts only: compiling csrc/ failed" in said
    assert not stale.exists()


@pytest.mark.slow
@needs_cxx
def test_compiler_without_the_isa_flags_builds_the_portable_kernels(tmp_path):
    """What another architecture or an old g++ builds: no ISA file at all."""
    cxx = tmp_path / "old-c++"
    cxx.write_text('#!/bin/sh\ncase "$*" in *-mavx*|*-mamx*) echo "unknown flag" >&2; exit 1;; esac\nexec c++ "$@"\n')
    cxx.chmod(0o755)
    build(ROOT, tmp_path, {"CXX": str(cxx), "FASTPETL_CUDA": "0", "FASTPETL_REQUIRE_EXT": "1"})
    info = python("-m", "fastpetl", "info", cwd=tmp_path / "lib").stdout
    assert "portable in use, available: portable;" in info


@pytest.mark.skipif(BUILT is None, reason=WHY_NOT)
def test_build_info_names_what_was_built():
    info = build_info()
    assert {"compiler", "torch_headers", "x86", "cuda", "cuda_archs", "nvcc"} <= info.keys()
    assert bool(info["cuda_archs"]) == bool(info["nvcc"]) == info["cuda"]
    assert BUILT.cpu_isa() in BUILT.cpu_isas()
    with pytest.raises(ValueError, match="set_cpu_isa: name is 'sse9', expected one of: "):
        BUILT.set_cpu_isa("sse9")
