"""A model that serves several threads at once: what one forward leaves for its later parts is nobody else's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastpetl
import hf_tiny
from copied_vilt import Stack
from fastpetl.skip.per_thread import PerThread
from skip.test_seq2seq_skip import build, given
from vilt_tiny import one_thread, randomize  # noqa: F401

WAIT = 30  # seconds, for a test that fails
KEEPS = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()


def by_the_batch(x, n_blocks):
    """Another mask for each size of batch: who takes another's is seen."""
    return KEEPS[x.shape[0] - 1, :n_blocks].expand(x.shape[0], -1)


def copied(**_):
    torch.manual_seed(3)
    model = Stack(layers=2).eval()
    randomize(model, 0.3)
    return model


def bert_inputs(n):
    return hf_tiny.ids(batch=n, padded=False)


# name -> (model, inputs of so many samples, where its forward begins, a part of its block 0)
MODELS = {
    "bart": (lambda: build("bart"), lambda n: given("bart", slice(n)), "model.encoder.layernorm_embedding", "fc1"),
    "t5": (lambda: build("t5"), lambda n: given("t5", slice(n)), "encoder.embed_tokens", "layer.1.DenseReluDense.wi"),
    "bert": (lambda: hf_tiny.build("bert"), bert_inputs, "embeddings", "intermediate.dense"),
    "copied_vilt": (copied, lambda n: {"x": torch.randn(n, 6, 16)}, None, "mlp.fc1"),
}


def output(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits if "logits" in out else out[0]


class Pause:
    """A hook that stops the thread called `who`, once: it says so and waits for `until`."""

    def __init__(self, module, who: str, until: threading.Event):
        self.there, self.who, self.until = threading.Event(), who, until
        self.handle = module.register_forward_hook(self)

    def __call__(self, *_):
        if threading.current_thread().name == self.who and not self.there.is_set():
            self.there.set()
            assert self.until.wait(WAIT)


def both(model, inputs, first: Pause, second: Pause | None = None):
    """The outputs of two threads, the second of which begins when the first pauses."""
    found = {}

    def serve(name, given):
        try:
            found[name] = output(model, given)
        except Exception as error:
            found[name] = error
        if name == "second" or second is not None:
            (first.until if name == "second" else second.until).set()

    threads = [
        threading.Thread(target=serve, args=pair, name=pair[0])
        for pair in zip(("first", "second"), inputs, strict=True)
    ]
    threads[0].start()
    assert first.there.wait(WAIT)
    threads[1].start()
    if second is not None:
        assert second.there.wait(WAIT)
        first.until.set()
    for thread in threads:
        thread.join(WAIT)
    for pause in filter(None, (first, second)):
        pause.handle.remove()
    return [found["first"], found["second"]]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, torch.Tensor), a
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_inside_another_ones_block(name):
    make, inputs, _, part = MODELS[name]
    model = make()
    fastpetl.skip(model, by_the_batch)
    two = inputs(1), inputs(3)
    want = [output(model, one) for one in two]
    block = model.get_submodule(fastpetl.blocks(model)[0].name)
    pause = Pause(block.get_submodule(part), "first", threading.Event())
    assert_equal(both(model, two, pause), want)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_forwards_that_begin_before_the_other_ends(name, prune):
    make, inputs, begins, _ = MODELS[name]
    model = make()
    fastpetl.skip(model, [False, True, True, False])
    if prune:
        fastpetl.prune(model)
    two = inputs(1), inputs(3)
    want = [output(model, one) for one in two]
    module = model.get_submodule(begins)
    pauses = [Pause(module, who, threading.Event()) for who in ("first", "second")]
    assert_equal(both(model, two, *pauses), want)


def test_threads_that_have_ended_leave_little():
    place = PerThread()
    for _ in range(3):  # threads that take turns, whatever number each gets
        with ThreadPoolExecutor(1) as pool:
            pool.submit(place.set, "theirs").result()
    for name in range(1000):
        place.set("mine", name)
    assert place.get(999) == "mine" and place.get(0) is None and len(place.held) <= 256
    place.drop(999)
    assert place.get(999) is None
