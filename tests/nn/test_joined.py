"""fastpetl.nn.joined: a mixin and somebody's class under that class's names, in one another too."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpetl.nn.copied_seq2seq import knowing
from fastpetl.nn.turns import original_of, taking_turns


@pytest.mark.parametrize("inner", [nn.ModuleList, knowing(nn.ModuleList)], ids=["class", "joined class"])
def test_names_copies_and_pickles(inner):
    cls = taking_turns(inner)
    assert taking_turns(inner) is cls and original_of(cls) is inner and issubclass(cls, nn.ModuleList)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(cls, name) == getattr(nn.ModuleList, name)
    module = nn.ModuleList([nn.Linear(2, 2)])
    module.__class__ = cls
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is cls and torch.equal(other._modules["0"].weight, module._modules["0"].weight)
