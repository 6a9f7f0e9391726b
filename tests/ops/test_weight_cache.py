"""WeightCache: what is made of parameters is kept while they stay, and never longer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastpetl import ops


def draw(calls):
    """(rules, weights): leaves that want gradients."""
    rules = [torch.randn(n, n, n).requires_grad_() for n, _, _ in calls]
    weights = [(torch.randn(s) / 4).requires_grad_() for s in calls]
    return rules, weights


def test_cache_is_never_stale():
    rules, weights = draw([(2, 8, 3), (2, 3, 8)])
    module = torch.nn.Module()
    module.p = torch.nn.ParameterList([*rules, *weights])
    cache, made = ops.WeightCache(), []

    def get():
        p = list(module.p)
        return cache.get("all", p, lambda: made.append(1) or ops.phm_weights(p[:2], p[2:]))

    def check(times):
        with torch.no_grad():
            now = get()
            assert get() is now or not len(cache)
        p = list(module.p)
        for h, want in zip(now, ops.phm_weights_reference(p[:2], p[2:]), strict=True):
            torch.testing.assert_close(h, want.detach())
        assert len(made) == times

    check(1)
    for i, change in enumerate(
        [
            lambda: step(module),
            lambda: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}),
            lambda: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True),
            lambda: assign(module, 3),  # the allocator likes to give the same address again
            lambda: module.p[2].data.mul_(3),
            lambda: module.to(torch.float64).to(torch.float32).p[0].data.mul_(2),
            lambda: cache.clear(),
        ]
    ):
        change()
        check(i + 2)
    before = len(made)
    get()
    assert len(made) == before + 1, "a recorded call makes its own"
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(other, ops.WeightCache) and len(other) == 0


def step(module):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(module.parameters(), lr=0.1).step()


def assign(module, times):
    for _ in range(times):
        module.p[2].data = module.p[2].data.clone() + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_looking_for_changes_reads_all_parameters_in_one_operation(dtype):
    """Decoding looks at every site for every token. A parameter that is not dense is seen too."""
    weights = [torch.randn(6, 5, dtype=dtype), torch.randn(40, 30, dtype=dtype).t(), torch.randn(3, dtype=dtype)]
    weights[0][0, 0] = torch.nan
    cache, made = ops.WeightCache(), []

    def get(sources):
        return cache.get("all", sources, lambda: made.append(1) or [t.clone() for t in sources])

    for sources in ([weights[0], weights[2]] * 8, weights):
        get(sources)
        before = len(made)
        with Operations() as seen:
            get(sources)
        assert seen.names.count("cat") == seen.names.count("equal") == 1 and len(made) == before
        assert len(seen.names) <= (2 if len(sources) == 16 else 7)
        for t in sources[-2:]:
            with torch.no_grad():
                t.data.mul_(2)
            assert all(torch.equal(got, t) or got.isnan().any() for got, t in zip(get(sources), sources, strict=True))
            assert len(made) == (before := before + 1)


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operations that are not views of a parameter's own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_cache_in_inference_mode_makes_normal_tensors():
    rules, weights = draw([(2, 8, 3)])
    cache = ops.WeightCache()
    with torch.inference_mode():
        (h,) = cache.get("all", weights, lambda: ops.phm_weights(rules, weights))
        assert not h.is_inference()
    x = torch.randn(4, 16, requires_grad=True)
    F.linear(x, h).sum().backward()
    with torch.inference_mode():
        made = torch.randn(2, 2)
        cache.get("other", [made], lambda: made + 1)
        cache.get("nothing to watch", [], lambda: made + 1)  # a DataParallel replica names no parameters
    assert len(cache) == 1


def test_a_made_weight_is_read_by_the_cache_of_its_sources_alone():
    """What a WeightCache made changes with its sources; a pack of it need not look at its values again."""
    weight, pack, made = torch.randn(8, 8), ops.PackCache(), ops.WeightCache()

    def packed():
        merged = made.get("task", [weight], lambda: weight * 2)
        return pack.get("kind", [merged], lambda: merged.clone())

    first = packed()
    assert packed() is first and pack._held[1]._values is None
    weight.data.mul_(3)  # leaves the version counter as it is
    assert torch.equal(packed(), weight * 2)
