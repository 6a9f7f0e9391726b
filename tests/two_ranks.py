"""Two gloo processes for a test module's `_rank(rank, folder)`: fresh interpreters, for forked ones inherit locks."""

import os
import subprocess
import sys
import time
from pathlib import Path

# Neither destroys its process group nor shuts down: gloo's destructor joins, holding the GIL, a thread that may want
# it. A rank that is through says so and waits to be killed, so that nobody's last message is lost either.
CODE = """
import pathlib, sys, time, {module}
folder, rank = pathlib.Path(sys.argv[1]), int(sys.argv[2])
{module}._rank(rank, folder)
(folder / f"done{{rank}}").touch()
time.sleep(600)
"""


def run(test_file: str, folder, seconds: float = 120) -> None:
    """Semantics: runs `_rank(0, folder)` and `_rank(1, folder)` of `test_file` side by side until both returned."""
    file = Path(test_file)
    path = os.pathsep.join([*map(str, file.parents[:3]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE.format(module=file.stem), str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], env=env) for rank in (0, 1)]
    end = time.monotonic() + seconds
    try:
        while not all(Path(folder, f"done{rank}").exists() for rank in (0, 1)):
            assert [rank.poll() for rank in ranks] == [None, None], "a rank failed"
            assert time.monotonic() < end, f"the ranks were not through after {seconds} s"
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
