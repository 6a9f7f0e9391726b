"""The CUDA kernels on the CPU under AddressSanitizer and, a thread for each CUDA thread, under ThreadSanitizer."""

import os
import re
import subprocess

import pytest

import cuda_kernels as ck

pytestmark = pytest.mark.skipif(bool(ck.WHY_NOT), reason=ck.WHY_NOT)
DRIVER = ck.ROOT / "tests/build/cuda_driver.cpp"
BARRIERS = re.search(r"enum FpBarrier \{ (.*?) \}", (ck.ROOT / "csrc/cuda/launch.cuh").read_text())[1].split(", ")


def sanitizer_links(folder, flag):
    """Whether this compiler has the sanitizer at all: what fails afterwards is our code's fault."""
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = [ck.CXX, flag, folder / "empty.cpp", "-o", folder / "empty"]
    return subprocess.run([*map(str, command)], capture_output=True).returncode == 0


def build(folder, flag, *more):
    """A driver of its own: a sanitizer has to be in the process from its start."""
    if not sanitizer_links(folder, flag):
        pytest.skip(f"{ck.CXX} cannot link {flag}")
    return ck.compile_host(folder / "driver", "-g", flag, *more, "-O0", sources=[*ck.SOURCES, DRIVER], shared=False)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return build(tmp_path_factory.mktemp("asan"), "-fsanitize=address")


@pytest.fixture(scope="module")
def thread(tmp_path_factory):
    driver = build(tmp_path_factory.mktemp("tsan"), "-fsanitize=thread", "-DCUDA_HOST_THREADS")
    if "unexpected memory mapping" in run(driver, "rows").stdout:
        pytest.skip("ThreadSanitizer does not start under this kernel's address layout")
    return driver


def run(driver, case, barrier=None):
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    if barrier:
        environment["CUDA_HOST_PLANTED"] = str(BARRIERS.index(barrier))
    command = [str(driver), case]
    return subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("case", ["forward", "resident", "backward", "large", "rows"])
def test_address_sanitizer_finds_nothing(address, case):
    done = run(address, case)
    assert done.returncode == 0 and done.stdout.endswith("good\n"), done.stdout


def test_address_sanitizer_sees_a_buffer_that_is_too_short(address):
    assert "heap-buffer-overflow" in run(address, "short").stdout


@pytest.mark.parametrize("case", ["forward", "resident", "backward", "rows"])
def test_no_thread_races_with_another(thread, case):
    done = run(thread, case)
    assert done.returncode == 0 and done.stdout.endswith("good\n"), done.stdout


@pytest.mark.parametrize(
    "case, barrier",
    [
        ("forward", "FP_CHUNK"),  # shared memory read before it is written
        ("forward", "FP_REUSE"),  # ... and written before it is read
        ("forward", "FP_SUM"),  # global memory
        ("resident", "FP_CHUNK"),
        ("backward", "FP_PANEL"),
        ("backward", "FP_REUSE"),
    ],
)
def test_a_missing_barrier_is_reported(thread, case, barrier):
    assert "ThreadSanitizer: data race" in run(thread, case, barrier).stdout
