"""Hooks added, removed, switched, lent for a time, in any order: each fires where it should, and nothing is left."""

import copy
import pickle
import random
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.hooks import HookManager, Observer

CALLS = {"a": 2, "b": 2, "c": 2, "": 1}
PORTS = ("output", "output", "grad_output", "input")
KINDS = ("observer", "looks", "replaces")
CHECKPOINTS = {"none": None, "not reentrant": False, "reentrant": True}


class Net(nn.Module):
    """Each part is called twice, the second time within activation checkpointing where there is any."""

    def __init__(self, checkpointed):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)
        self.checkpointed = checkpointed

    def part(self, x):
        return self.c(self.b(self.a(x)))

    def forward(self, x):
        x = self.b(self.a(x))
        reentrant = CHECKPOINTS[self.checkpointed]
        x = self.part(x) if reentrant is None else checkpoint(self.part, x, use_reentrant=reentrant)
        return self.c(x)


class Wanted:
    """One hook, what it was told, and what it should have been."""

    def __init__(self, draw):
        self.path, self.port, self.kind = draw.choice(list(CALLS)), draw.choice(PORTS), draw.choice(KINDS)
        self.name = f"{self.path}:{self.port}"
        self.told, self.is_on, self.hook = [], True, None

    def function(self):
        def fn(tensor, point):
            self.told.append((point.name, point.call))
            return tensor * 1.0 if self.kind == "replaces" else None

        return Observer(fn) if self.kind == "observer" else fn

    def due(self, with_gradients):
        silent = not self.is_on or (self.port == "grad_output" and not with_gradients)
        return set() if silent else {(self.name, call) for call in range(CALLS[self.path])}


class Sequence:
    def __init__(self, seed):
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.model = Net(self.draw.choice([*CHECKPOINTS, "none"]))
        self.hooks = HookManager(self.model)
        self.live = []

    def run(self, *more):
        """One forward pass, with or without backward; every hook is told what is due, once each."""
        with_gradients = self.draw.random() < 0.6
        before = {wanted: len(wanted.told) for wanted in (*self.live, *more)}
        with torch.set_grad_enabled(with_gradients):
            output = self.model(torch.randn(2, 4, requires_grad=True))
        if with_gradients:
            output.sum().backward()
        for wanted, start in before.items():
            self.check(wanted, wanted.told[start:], with_gradients)

    def check(self, wanted, told, with_gradients):
        assert set(told) == wanted.due(with_gradients), wanted.name
        if self.model.checkpointed == "none":  # else what acts does so again, when the forward is repeated
            assert len(told) == len(set(told)), wanted.name

    def add(self):
        wanted = Wanted(self.draw)
        wanted.hook = self.hooks.add(wanted.name, wanted.function())
        self.live.append(wanted)

    def remove(self):
        if self.live:
            self.live.pop(self.draw.randrange(len(self.live))).hook.remove()

    def switch(self):
        if self.live:
            wanted = self.draw.choice(self.live)
            (wanted.hook.disable if wanted.is_on else wanted.hook.enable)()
            wanted.is_on = not wanted.is_on

    def lend(self):
        """For the time of a block, which may raise."""
        wanted = Wanted(self.draw)
        try:
            with self.hooks.temporary((wanted.name, wanted.function()), missing="ignore"):
                self.run(wanted)
                if self.draw.random() < 0.3:
                    raise KeyError("the user's own")
        except KeyError:
            pass
        over = len(wanted.told)
        self.run()
        assert len(wanted.told) == over

    def run_with(self):
        wanted = Wanted(self.draw)
        hooks = [(wanted.name, wanted.function())]
        self.hooks.run_with_hooks(torch.randn(2, 4), hooks=hooks, missing="ignore").sum().backward()
        self.check(wanted, wanted.told, True)

    def copied(self):
        """A copy of the model tells nobody."""
        way = self.draw.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
        before = [len(wanted.told) for wanted in self.live]
        way(self.model)(torch.randn(2, 4)).sum().backward()
        assert [len(wanted.told) for wanted in self.live] == before


@pytest.mark.parametrize("seeds", [pytest.param(range(i, i + 25), id=f"{i}") for i in range(0, 100, 25)])
def test_each_hook_is_told_what_is_due_whatever_came_before(seeds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reentrant checkpointing of inputs without gradients
        for seed in seeds:
            sequence = Sequence(seed)
            steps = [Sequence.add, Sequence.remove, Sequence.switch, Sequence.lend, Sequence.run_with, Sequence.copied]
            for _ in range(sequence.draw.randint(4, 14)):
                sequence.draw.choices(steps, [6, 3, 3, 3, 2, 1])[0](sequence)
                sequence.run()
            sequence.hooks.close()
            kept = [hooks for m in sequence.model.modules() for name, hooks in vars(m).items() if "_hooks" in name]
            assert not any(kept), seed
