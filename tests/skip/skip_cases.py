"""What the tests of skipping per sample share."""

import torch

import fastpetl
from vilt_tiny import inputs

MASK = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]]).bool()


def batch(n=5):
    """n different samples, the last padded; and the generator's state that orders their patches alike."""
    return inputs(batch=n)


def logits(model, mask=None, data=None, **kwargs):
    with fastpetl.skip(model, mask, **kwargs) if mask is not None else fastpetl.skip(model, None):
        torch.manual_seed(1)
        return model(**(data or batch())).logits
