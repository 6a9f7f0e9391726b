"""Skipping in the copied originals: what their own loops gave, and what is told to whom it cannot be given."""

import pytest
import torch
from torch import nn

import copied_stacks
import fastpetl
import hf_tiny
from fastpetl import skip
from skip.turn_families import BATCH, build, inputs, mask_of, output, values
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


def test_what_cannot_be():
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
