"""Forwards that run twice or are traced: activation checkpointing both ways, torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .data import generator, text
from .sequence import GPT, letters_batch
from .street import Street, program


class Checkpointed(GPT):
    use_reentrant = False

    def __init__(self, letters: int) -> None:
        super().__init__(letters)
        blocks = self.transformer["blocks"]
        self.transformer["blocks"] = nn.ModuleList([Recomputed(block, self.use_reentrant) for block in blocks])


class Recomputed(nn.Module):
    def __init__(self, block: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


class CheckpointedReentrant(Checkpointed):
    use_reentrant = True


def train_letters(street: Street, model: nn.Module, lr: float = 3e-3):
    draw = generator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            tokens, targets = letters_batch(draw)
            _, loss = model(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch=(tokens, targets))
            street.note(loss)
    return model, optimizer


@program(steps=20)
def checkpoint_not_reentrant(street: Street):
    """Each block recomputed in backward, with dropout: the random state is put back for it."""
    return train_letters(street, Checkpointed(text()[1]))


@program(steps=20)
def checkpoint_reentrant(street: Street):
    """The old form: a custom autograd function that runs backward within backward."""
    return train_letters(street, CheckpointedReentrant(text()[1]))


@program(steps=12, saved=False, traced=True)
def compiled(street: Street):
    """`torch.compile` before the watch: what is traced without hooks stays as it is."""
    model = GPT(text()[1])
    torch._dynamo.reset()
    return train_letters(street, torch.compile(model, backend="aot_eager"))
