"""The kernel family at the sizes of the papers' models (fastpetl/bench/cases.py): baselines and our backends."""

import pytest

from . import common

from fastpetl.bench import ops  # isort: skip
from fastpetl.bench.cases import CASES, Size  # isort: skip

PLAN = ops.Plan()
PARAMS = [(case, short, mode, n) for short, case, mode, names in ops.selected(PLAN) for n in names]


@pytest.mark.parametrize("case, short, mode, name", PARAMS, ids=lambda v: getattr(v, "name", v))
def test_op(benchmark, case, short, mode, name):
    benchmark.group = f"{case.name} {short} {mode}"
    common.torch._dynamo.reset()
    built, grads, functions, _ = ops.prepare(PLAN, case, short, mode, [name], ops.implementation, benchmark.group)
    if name not in functions:
        pytest.skip("routed eager is not true fp32 for this shape")
    function = functions[name]
    floor = ops.floors(built, Size(), mode)
    common.timed(benchmark, ops.call(name, function, built, grads), 1e9 * floor["gflop"], floor_mib=floor["floor_mib"])


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES)
