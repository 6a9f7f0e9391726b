"""A task small enough to search in a second, shared by the tests of the search."""

import torch

import fastpetl
from fastpetl.das import search
from vilt_tiny import inputs, tiny_das


class Task:
    """Two samples to learn by heart: micro-batches and validation batches that depend on their number alone."""

    def __init__(self, patch=True):
        self.model = tiny_das(patch=patch)
        self.data = inputs()
        self.target = torch.eye(5)[:2]
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.seen = []

    def loss(self, outputs, target):
        return torch.nn.functional.cross_entropy(outputs.logits, target)

    def step(self, i):
        self.model.train()
        torch.manual_seed(i)
        self.optimizer.zero_grad()
        self.loss(self.model(**self.data), self.target).backward()
        self.optimizer.step()
        self.seen.append(fastpetl.skip.current(self.model))

    def evaluate(self, r):
        torch.manual_seed(1000 + r)
        assert not torch.is_grad_enabled()
        return self.loss(self.model(**self.data), self.target)

    def batches(self, r):
        torch.manual_seed(1000 + r)
        return self.data, self.target

    def search(self, evaluate=None, **kwargs):
        options = {"steps": 12, "n_skip": 2, "turn": 3, "progress": False, **kwargs}
        return search(self.model, self.step, evaluate or self.evaluate, **options)
