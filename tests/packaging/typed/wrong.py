"""A user's program with mistakes, each of which a type checker sees."""

from __future__ import annotations

import torch
from torch import nn

from gradwatch import Watch
from gradwatch.requests import LowerLearningRates
from gradwatch.rules import Exploding
from gradwatch.treatments import ClipByNorm, SkipStep

model = nn.Linear(4, 1)
watch = Watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
a = ClipByNorm(max_nrm=1.0)  # wrong
b = Exploding(ration=10)  # wrong
c = SkipStep("ten")  # wrong
d = LowerLearningRates(steps=3)  # wrong
e = watch.step(los=1.0)  # wrong
f: int = watch.step().record  # wrong
