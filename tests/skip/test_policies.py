"""Policies: who decides which blocks a sample skips, and what they learn from it."""

import copy
import pickle

import pytest
import torch

import fastpetl
import meter_tiny
from fastpetl.das.gates import Fill
from fastpetl.skip import policies
from skip import test_seq2seq_skip as seq2seq
from skip.skip_cases import MASK, logits
from vilt_tiny import everything, gradients, inputs, one_thread, pair, relative, run, tiny_das, tiny_vilt  # noqa: F401


def drawn(policy, n=2000, blocks=4, training=True):
    torch.manual_seed(0)
    return policy.masks(torch.randn(n, 3, 8), blocks, training)


def test_random_skip():
    mask, scale = drawn(policies.RandomSkip([0.0, 0.25, 0.5, 0.9]))
    assert torch.allclose(mask.float().mean(0), torch.tensor([0.0, 0.25, 0.5, 0.9]), atol=0.04)
    assert torch.allclose(scale[0], torch.tensor([1.0, 4 / 3, 2.0, 10.0]))
    assert drawn(policies.RandomSkip(0.5, scaled=False))[1] is None
    mask, scale = drawn(policies.RandomSkip(0.5), training=False)
    assert not mask.any() and scale is None
    model = tiny_vilt().train()
    fastpetl.skip(model, policies.RandomSkip(0.5))
    assert not torch.equal(run(model, seed=1).logits, run(model, seed=2).logits)
    for rate in (1.0, -0.1, [0.5, True]):
        with pytest.raises(ValueError, match="RandomSkip: rate is .* expected numbers in"):
            policies.RandomSkip(rate)
    with pytest.raises(ValueError, match="RandomSkip: rate has 2 numbers, expected one or n_blocks=4"):
        drawn(policies.RandomSkip([0.1, 0.2]))


def test_scaled_blocks():
    """A kept block adds scale times what it adds: stochastic depth keeps the expectation."""
    model = tiny_vilt()

    class Fixed(policies.Policy):
        def masks(self, x, n_blocks, training):
            return MASK[:2], torch.full((2, 4), 2.0)

    x = torch.randn(2, 9, 32)

    class Wrong(Fixed):
        def masks(self, x, n_blocks, training):
            return MASK[:2], torch.full((4,), 2.0)

    with (
        fastpetl.skip(model, Wrong()),
        pytest.raises(ValueError, match=r"skip: scale is torch.float32 \(4,\), expected"),
    ):
        model.vilt.encoder(x)
    with fastpetl.skip(model, Fixed()):
        got = model.vilt.encoder(x).last_hidden_state
    for b in range(2):
        y = x[b : b + 1]
        for i, layer in enumerate(model.vilt.encoder.layer):
            if not MASK[b, i]:
                y = y + 2 * (layer(y)[0] - y)
        assert relative(got[b : b + 1], y) <= 1e-5


def test_bandit():
    gates = torch.tensor([0.0, 3.0, -3.0, 0.0], dtype=torch.float64)
    mask, _ = drawn(policies.Bandit(gates, 2))
    assert (mask.sum(1) == 2).all() and mask[:, 1].float().mean() > 0.7 > 0.2 > mask[:, 2].float().mean()
    mask, _ = drawn(policies.Bandit(gates + torch.tensor([0, 0, 0, 0.1]), 2), training=False)
    assert mask.all(0).tolist() == [False, True, False, True]
    assert not drawn(policies.Bandit(gates, 0))[0].any()
    for tied in (torch.zeros(4).double(), gates):  # of equals the later, as the search's plan
        (mask, _) = drawn(policies.Bandit(tied, 3), n=1, training=False)
        assert tuple(mask[0].nonzero().flatten().tolist()) == Fill(4, 3).best(tied)
    low = torch.full((4,), -900.0, dtype=torch.float64)  # sigmoid gives 0
    assert (drawn(policies.Bandit(low, 3))[0].sum(1) == 3).all()
    with pytest.raises(ValueError, match="Bandit: the model has 5 blocks, expected 4, one for each gate"):
        drawn(policies.Bandit(gates, 2), blocks=5)
    with pytest.raises(ValueError, match="Bandit: n_skip is 5, expected 0 to 4"):
        policies.Bandit(gates, 5)


def test_router_learns_what_to_keep():
    model = tiny_das(patch=True).train()
    router = policies.Router(32, 4, budget=0.5)
    fastpetl.skip(model, router)
    out = run(model).logits
    assert not router.penalty.isnan() and router.gate.weight.grad is None
    (out.square().sum() + router.penalty).backward()
    assert router.gate.bias.grad.abs().min() > 0 and router.gate.weight.grad.any()
    assert "router" not in str(model.state_dict().keys())
    torch.nn.init.constant_(router.gate.bias, -9.0)
    assert router.masks(torch.randn(3, 2, 32), 4, True)[0].all()
    router.capacity = 1
    assert (~router.masks(torch.randn(3, 2, 32), 4, True)[0]).sum(0).tolist() == [1] * 4
    with pytest.raises(ValueError, match="Router: budget is 2, expected a share"):
        policies.Router(8, 4, budget=2)
    with pytest.raises(ValueError, match="Router: the model has 5 blocks, expected n_blocks=4"):
        router.masks(torch.randn(3, 2, 32), 5, True)


def test_router_gets_the_gradient_of_its_blocks_scale():
    """Without the penalty: dp is the gradient of a scale of 1 on what the kept blocks add."""
    model = tiny_das(patch=True).train()
    router = policies.Router(32, 4)
    torch.nn.init.normal_(router.gate.weight, std=0.3)
    seen = []

    class Known(policies.Policy):
        pools = True

        def masks(self, x, n_blocks, training, real):
            mask, _ = router.masks(x, n_blocks, training, real)
            means = [row[keep].mean(0) for row, keep in zip(x.detach(), real, strict=True)]
            p = torch.sigmoid(router.gate(torch.stack(means))).detach()
            scale = torch.ones_like(p).requires_grad_()
            seen.append((p, scale))
            return mask, scale

    with fastpetl.skip(model, Known()):
        run(model).logits.square().sum().backward()
    p, scale = seen[0]
    want = (scale.grad * p * (1 - p)).sum(0)
    with fastpetl.skip(model, router):
        run(model).logits.square().sum().backward()
    assert want.abs().max() > 1e-6 and relative(router.gate.bias.grad, want) <= 1e-4


def test_router_does_not_see_padding():
    """A sample's choice does not depend on how long its neighbours are."""
    torch.manual_seed(0)
    router = policies.Router(32, 4)
    torch.nn.init.normal_(router.gate.weight, std=2.0)
    model, seen = tiny_vilt(), []
    x = torch.randn(3, 9, 32)
    padding = torch.zeros(3, 1, 1, 9)
    padding[1, ..., 5:] = torch.finfo(torch.float32).min
    other = x.clone()
    other[1, 5:] = 9 * torch.randn(4, 32)

    class Seen(policies.Policy):
        pools = True

        def masks(self, x, n_blocks, training, real):
            mask, scale = router.masks(x, n_blocks, training, real)
            seen.append((scale, mask))
            return mask, None

    with torch.no_grad(), fastpetl.skip(model, Seen()):
        for states, mask in ((x, padding), (other, padding), (x[1:2, :5], None), (other, None), (x, padding[1:2] * 0)):
            model.vilt.encoder(states, mask)
        kept = model.vilt.encoder(x, padding).last_hidden_state[1, :5]
        alone = model.vilt.encoder(x[1:2, :5]).last_hidden_state[0]
    masks = [mask for _, mask in seen]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0][1], masks[2][0])
    assert not torch.equal(masks[3], masks[0]) and relative(kept, alone) <= 1e-5


def test_callables():
    model, seen = tiny_das(), []

    def by_length(x, n_blocks):
        seen.append(tuple(x.shape))
        return MASK

    assert torch.equal(logits(model, by_length), logits(model, MASK)) and seen[0][0] == 5
    with pytest.raises(TypeError, match="Callback: function is int, expected a function"):
        policies.Callback(3)
    with pytest.raises(ValueError, match="Masks: mask is list, expected a bool tensor"):
        policies.Masks([[True]])


def test_a_policy_without_masks():
    class Undecided(policies.Policy):
        pass

    message = r"skip: policy is Undecided, which does not define masks, expected .*masks\(self, x, n_blocks, training\)"
    with pytest.raises(NotImplementedError, match=message):
        logits(tiny_das(), Undecided())


@pytest.mark.parametrize("kind", ["vilt", "meter", "vlbart", "t5"])
def test_a_model_with_a_router_is_copied_and_pickled(kind):
    """After a forward too, whose penalty and scale hang on a graph; and what a router keeps runs as without one."""
    if kind in ("vilt", "meter"):
        model, given = (tiny_das(), inputs(3)) if kind == "vilt" else (meter_tiny.tiny(), meter_tiny.inputs(3))
    else:
        model, given = seq2seq.build(kind), seq2seq.given(kind)
    n = len(fastpetl.blocks(model))
    router = policies.Router(32, n)
    torch.nn.init.normal_(router.gate.weight, std=2.0)
    torch.nn.init.zeros_(router.gate.bias)
    chosen = []
    masks = router.masks
    router.masks = lambda *args, **told: chosen.append(masks(*args, **told)) or chosen[-1]
    fastpetl.skip(model, router)

    def logits(model):
        torch.manual_seed(1)
        return model(**given).logits

    want = logits(model)
    assert router.penalty.requires_grad and (chosen[0][1] == 1).all() and len(chosen[0][0].unique()) == 2
    del router.masks
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
    with fastpetl.skip(model, chosen[0][0]):
        assert torch.equal(logits(model), want)


def test_wrong_arguments():
    for rate in ("often", None, [0.1, "often"], [[0.1]], True, [0.1, 1.0]):
        with pytest.raises(ValueError, match="RandomSkip: rate is .*, expected numbers in"):
            policies.RandomSkip(rate)
    for rate in (torch.tensor([0.0, 0.5]), torch.tensor(0.5), 0):
        policies.RandomSkip(rate)
    for gates in ([0.0, 0.0], torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"Bandit: gates is .*, expected floats of shape .n_blocks,."):
            policies.Bandit(gates, 1)
    with pytest.raises(ValueError, match="Bandit: n_skip is 1.5, expected 0 to 4"):
        policies.Bandit(torch.zeros(4), 1.5)
    with pytest.raises(ValueError, match="Router: the blocks' width is 32, expected hidden=16"):
        logits(tiny_das(), policies.Router(16, 4))


def test_wrong_candidates():
    for sets in ([[True] * 4], torch.zeros(4).bool(), torch.zeros(2, 4), torch.zeros(0, 4).bool()):
        with pytest.raises(ValueError, match="Candidates: sets is .* expected a bool tensor of shape"):
            policies.Candidates(sets)
