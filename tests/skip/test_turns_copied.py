"""Skipping in the copied originals: what their own loops gave, and what is told to whom it cannot be given."""

import pytest
import torch
from torch import nn

import copied_stacks
import fastpetl
import hf_tiny
from fastpetl import skip
from fastpetl.skip import policies
from skip.turn_families import BATCH, FAMILIES, build, inputs, mask_of, output, rows, values
from vilt_tiny import one_thread, relative  # noqa: F401


@pytest.mark.parametrize("patch", [False, True])
def test_das_own_loop_gives_the_same(patch):
    """What DAS's flags do in its loop, for all samples."""
    model, given = build("copied_das_vilt", "auto" if patch else None), inputs("copied_das_vilt")
    assert [b.name for b in fastpetl.blocks(model)] == [f"transformer.blocks.{i}" for i in range(4)]
    assert all(b.shortcut_macs == 185 * 2 * 16 * 8 for b in fastpetl.blocks(model))
    with torch.no_grad():
        x = model.stem(given["x"])
        for i, block in enumerate(model.transformer.blocks):
            x = model.adapter_list[i](x) if i in (0, 2) else block(x, mask=given["mask"])[0]
        want = model.transformer.norm(x)
        for shortcut in (None, "adapter"):
            with fastpetl.skip(model, fastpetl.SkipPlan((0, 2)), shortcut=shortcut) as plan:
                assert plan.shortcut == "adapter" and relative(model(**given)["states"], want) <= 1e-6
        identity = output(model, given, fastpetl.SkipPlan((0, 2)), shortcut="identity")
        assert not torch.allclose(identity, values({"x": want, "pooled": want[:, 0]}))


def test_both_of_meters_layers_read_the_pair_before():
    model, given = build("copied_das_meter"), inputs("copied_das_meter")
    names = [f"cross_modal_{kind}_layers.{i}" for kind in ("text", "image") for i in range(2)]
    assert [b.name for b in fastpetl.blocks(model)] == names
    mask, none = given["mask"], torch.zeros(BATCH, 1, 1, 12)
    with torch.no_grad():
        x, y = model.stem(given["x"]), model.image_stem(given["x"][:, :12].flip(-1))
        # text layer 1 and image layer 0 are skipped
        x, y = model.cross_modal_text_layers[0](x, y, mask, none)[0], model.adapter_list_v[0](y)
        x, y = model.adapter_list_l[1](x), model.cross_modal_image_layers[1](y, x, none, mask)[0]
        for chosen in ([False, True, True, False], [[False, True, True, False]] * BATCH):
            with fastpetl.skip(model, chosen):
                out = model(**given)
            assert relative(out["states"], x) <= 1e-6 and relative(out["image"], y) <= 1e-6


@pytest.mark.parametrize("half", [0, 1])
def test_both_halves_of_lxmerts_pair_read_it_as_it_was(half):
    model, given = build("copied_lxmert"), inputs("copied_lxmert")
    names = ["layer.0", "layer.1", "x_layers.0.lang", "x_layers.1.lang", "r_layers.0"]
    names += ["x_layers.0.visn", "x_layers.1.visn"]
    assert [b.name for b in fastpetl.blocks(model)] == [f"encoder.{name}" for name in names]
    pairs = []
    model.encoder.x_layers[1].register_forward_hook(lambda m, args, out: pairs.append((args, out)))
    with torch.no_grad():
        model(**given)
        (before, after), plan = pairs[0], [i == (3, 6)[half] for i in range(7)]
        for chosen in (plan, [plan] * BATCH):
            with fastpetl.skip(model, chosen):
                out = model(**given)
            assert relative(out["states"], before[0] if half == 0 else after[0]) <= 1e-6
            assert relative(out["image"], before[2] if half == 1 else after[1]) <= 1e-6


def test_maps_of_those_that_run_a_block():
    model, given, seen = build("copied_vilt"), inputs("copied_vilt"), []
    call = model.call
    model.call = lambda *args, **kwargs: seen.append(call(*args, **kwargs)) or seen[-1]
    mask = mask_of("copied_vilt")
    with torch.no_grad(), fastpetl.skip(model, mask):
        model(**given)
    for i, (_, maps) in enumerate(seen):
        ran = [False] * BATCH if maps is None else [bool(one.any()) for one in maps]
        assert ran == (~mask[:, i]).tolist()


class Named(copied_stacks.copied_vilt.Block):
    def forward(self, x, mask=None):
        return {"x": super().forward(x, mask)[0]}


class Strict(copied_stacks.copied_vilt.Block):
    def forward(self, x, mask, extra):
        return super().forward(x, mask)


class Other(copied_stacks.Pair):
    def forward(self, x, mask, y, y_mask):
        x = super().forward(x, mask, y, y_mask)[0]
        return x, super().forward(x, mask, y, y_mask)[1]  # reads the new one


class Longer(copied_stacks.Pair):
    def forward(self, x, mask, y, y_mask, extra):
        return super().forward(x, mask, y, y_mask)


def test_what_cannot_be():
    for cls, message in (
        (Other, r"skip: x_layers\.0 gives another pair than its halves give, expected the original's"),
        (Longer, r"skip: x_layers\.0 does not take the original's call \(TypeError: .*extra"),
    ):
        model = build("copied_lxmert")
        for pair in model.encoder.x_layers:
            pair.__class__ = cls
        with pytest.raises(ValueError, match=message):
            fastpetl.skip(model, [True] * 7)
    for cls, message in (
        (Named, r"skip: blocks\.0 gives a dict, expected its new state, alone or first"),
        (Strict, r"skip: blocks\.0 does not take the original's call \(TypeError: .*extra"),
    ):
        model = copied_stacks.Vilt()
        for block in model.transformer.blocks:
            block.__class__ = cls
        with pytest.raises(ValueError, match=message):
            fastpetl.skip(model, [True] * 4)
    both = nn.ModuleDict({"visual": copied_stacks.Clip(), "text": copied_stacks.Clip(text=True)})
    with pytest.raises(ValueError, match=r"blocks: model has 2 stacks of blocks \(visual, text\), expected one"):
        fastpetl.blocks(both)
    assert [b.kind for b in fastpetl.blocks(both["text"])] == ["text"] * 4
    with pytest.raises(ValueError, match="skip: shortcut is 'adapter', but the model has no shortcut adapters"):
        fastpetl.skip(copied_stacks.Vilt(), [True] * 4, shortcut="adapter")
    model = copied_stacks.Vilt()
    model.transformer.blocks[1] = nn.Linear(16, 16)  # not all are blocks
    with pytest.raises(ValueError, match="blocks: model is Vilt with no blocks known here, expected one of: .*copied"):
        fastpetl.blocks(model)


def test_trials_of_copies_are_nobodys_business():
    """Hooks are told of no call that is made to find out what a block gives or costs."""
    told = []
    for name in ("copied_vilt", "copied_lxmert", "copied_vlt5", "bert"):
        model = FAMILIES[name].make()
        for module in model.modules():
            module.register_forward_hook(lambda *_: told.append(1))
            module.register_forward_pre_hook(lambda *_, **__: told.append(1), with_kwargs=True)
        fastpetl.blocks(model)
        skip.skip(model, [False] * len(FAMILIES[name].kinds))
        assert not told, name


def test_methods_go_where_they_went():
    """Nothing is attached to the copied originals; a tower of transformers' inside one takes what it took."""
    with pytest.raises(
        ValueError, match=r"attach: model is Meter with no blocks known here, expected one of: (?!.*copi)"
    ):
        fastpetl.attach(copied_stacks.Meter(), fastpetl.LoRAConfig())
    model = copied_stacks.Meter()
    model.text_transformer = hf_tiny.build("roberta")
    assert [b.kind for b in fastpetl.blocks(model)] == ["text"] * 2 + ["image"] * 2
    fastpetl.attach(model, fastpetl.LoRAConfig())
    skip.skip(model, [True, False, False, False])
    assert skip.current(model).blocks == (0,)


# --- VL-BART and VL-T5 ------------------------------------------------------------------------------------------------

SEQ2SEQ = ["copied_vlbart", "copied_vlt5"]


def greedy(model, given, steps=4, beams=1):
    """What a decoder gives step by step, each step's token made of the one before; beams: so many of each sample."""
    task, mask = given["task"], given["mask"].repeat_interleave(beams, 0)
    source = model.encode(given["x"], given["mask"], task).repeat_interleave(beams, 0)
    y, pasts, found = given["y"][:, :2].repeat_interleave(beams, 0), None, []
    for _ in range(steps):
        y, pasts = model.decode(y, source, mask, pasts, task=task)
        pasts = [tuple(t[torch.arange(len(t))] for t in past) for past in pasts]  # as beams are moved about
        found.append(y[:, -1:])
        y = found[-1].tanh()
    return torch.cat(found, 1)


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_steps_of_a_decoder_keep_to_what_its_samples_skip(name, patch):
    model, given = build(name, "auto" if patch else None), inputs(name)
    mask = mask_of(name, seed=1)
    assert mask[:, 2].any() and mask[:, 3].any() and not mask[:, 2].all()  # the first of the decoder's too
    asked = []

    def once(x, n_blocks):
        asked.append(len(x))
        return mask

    with torch.no_grad():
        want = greedy(model, given)
        whole = [torch.zeros(4), torch.ones(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0])]
        for plan in [one.bool() for one in whole]:
            with fastpetl.skip(model, plan):
                static = greedy(model, given)
            with fastpetl.skip(model, plan.expand(BATCH, 4)):
                assert relative(greedy(model, given), static) <= 1e-5
        with fastpetl.skip(model, once):
            got = greedy(model, given)
            beams = greedy(model, given, beams=3)
        assert asked == [BATCH, BATCH] and not torch.allclose(got, want)
        assert relative(beams, got.repeat_interleave(3, 0)) <= 1e-5
        with fastpetl.skip(model, mask, capacity=int((~mask).sum(0).max())):
            assert relative(greedy(model, given), got) <= 1e-5
        for b in range(BATCH):
            with fastpetl.skip(model, mask[b]):
                alone = greedy(model, rows(given, slice(b, b + 1)))
            assert relative(got[b : b + 1], alone) <= 1e-5


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_step_is_as_in_the_whole(name):
    """With keys and values of the steps before, and a first block that is skipped: by all, by some."""
    model, given = build(name), inputs(name)
    source_of = lambda: model.encode(given["x"], given["mask"], "gqa")  # noqa: E731
    plans = [[False, False, True, False], [False, False, True, True], mask_of(name, seed=1)]
    with torch.no_grad():
        for plan in plans:
            with fastpetl.skip(model, plan):
                source = source_of()
                whole, _ = model.decode(given["y"], source, given["mask"], task="gqa")
                first, pasts = model.decode(given["y"][:, :10], source, given["mask"], task="gqa")
                assert all(len(t) == BATCH for past in pasts for t in past)
                rest, pasts = model.decode(given["y"][:, 10:], source, given["mask"], pasts, task="gqa")
            assert [t.shape[2] for t in pasts[0]] == [16, 16, 16, 16]
            assert relative(torch.cat([first, rest], 1), whole) <= 1e-5


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_knows_whose_states_it_is_given(name):
    model, given, asked = build(name), inputs(name), []

    def policy(x, n_blocks):
        asked.append(len(x))
        return mask_of(name, len(x), seed=len(asked))

    with torch.no_grad(), fastpetl.skip(model, policy):
        decode = lambda source: model.decode(given["y"], source, given["mask"], task="gqa")[0]  # noqa: E731
        first, other = (model.encode(x, given["mask"], "gqa") for x in (given["x"], given["x"].flip(0)))
        decode(other)
        assert len(asked) == 2
        decode(first)  # not of what came out last
        assert len(asked) == 3
        with pytest.raises(
            ValueError, match="skip: the decoder has a batch of 3, expected a multiple of the 5 samples"
        ):
            model.decode(given["y"][:3], first, given["mask"][:3], task="gqa")
        decode(first)
        assert len(asked) == 3
    assert type(model.encoder).__mro__[1] is nn.Module  # as it was
    sets = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()
    message = "skip: Candidates with past_key_value, expected use_cache=False"
    with torch.no_grad(), fastpetl.skip(model, policies.Candidates(sets)), pytest.raises(ValueError, match=message):
        greedy(model, given)


def test_the_bias_of_a_pruned_t5_stays():
    model, given = build("copied_vlt5"), inputs("copied_vlt5")
    with torch.no_grad():
        want = output(model, given, [True, False, True, False])
        fastpetl.prune(model, [True, False, True, False])
        assert torch.equal(values(model(**given)), want)
    keys = [key for key in model.state_dict() if "block.0" in key]
    assert keys == [
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")
    ]
    assert [b.macs == 0 for b in fastpetl.blocks(model)] == [True, False, True, False]
