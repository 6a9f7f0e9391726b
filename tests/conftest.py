"""What every test relies on. The first lines run before torch or triton is imported anywhere."""

import gc
import importlib.util
import os
import random
import sys

# `make test` shares the tests between two processes. Each then has one thread, and what it starts has: more would wait
# for the other's. Tests of threads say how many they want.
SHARED = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1
if SHARED:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # in tests of threads too: who spins takes the other's core
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in this process: a pool of its own imports torch again

import torch  # noqa: E402

# Triton reads TRITON_INTERPRET when its language module is imported and when a kernel is decorated: one process, one
# mode. Without a GPU that mode is the interpreter; tests that compile ahead of time start a process of their own.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # today's default; set so that it cannot change under us
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network

import numpy as np  # noqa: E402
import pytest  # noqa: E402

if os.environ.get("FASTPETL_TEST_DEVICE"):  # where the op tests make their tensors (benchmarks/gpu_suite.py: cuda)
    torch.set_default_device(os.environ["FASTPETL_TEST_DEVICE"])
torch.set_num_threads(1 if SHARED else 2)  # the same sums, and the same speed, on every machine

# A seed for a device that is not there is queued, with the stack as text, which takes longer than a small test.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None

if os.environ.get("TRITON_INTERPRET") == "1" and all(map(importlib.util.find_spec, ("triton", "interp_patch"))):
    import interp_patch  # noqa: E402, F401  (corrects the interpreter's bf16)


class Why:
    """`WHY test: the error's first line` as soon as a test fails: a run that is cut off has said why."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            error = str(crash.message if crash else report.longrepr).strip().splitlines() or [""]
            self.terminal.write_line(f"\nWHY {report.nodeid}: {error[0][:300]}", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin("terminalreporter")  # pytest-xdist's workers have none
    if os.environ.get("FASTPETL_TEST_WHY") and terminal:
        config.pluginmanager.register(Why(terminal))


def what_is_there_stays():
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    """What importing and collecting made stays to the end: the garbage collector need not look at it each time, nor as
    often as it does by default, where a model is thousands of objects.
    """
    what_is_there_stays()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """So does what a file's tests leave behind (torch.compile's graphs): the benchmarks collect after every round."""
    yield
    if nextitem is None or nextitem.path != item.path:
        what_is_there_stays()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Nor does a test find graphs of others: they share code, ours and their own, and Dynamo's limit for it."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
