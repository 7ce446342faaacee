"""The end of a backward pass, seen from outside of the trainer."""

import copy
import pickle
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gradwatch.callbacks._backward_end import BackwardEnd, Pass
from tests.gloo import spawn


class Model(nn.Module):
    def __init__(self, *, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 1), reentrant

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.reentrant is None:
            hidden = self.first(x)
        else:
            hidden = checkpoint(self.first, x.requires_grad_(), use_reentrant=self.reentrant)
        logits = self.second(hidden.relu())
        return {"loss": logits.square().mean(), "logits": logits}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_gradient_is_there_once_per_backward(reentrant: bool | None) -> None:
    model, seen = Model(reentrant=reentrant), []

    def on_end(done: Pass) -> None:
        seen.append((done.weight.item(), [p.grad.clone() for p in model.parameters()]))

    end = BackwardEnd(model, on_end)
    for _ in range(2):
        (model(torch.ones(2, 3))["loss"] / 4).backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(seen[-1][1], model.parameters(), strict=True))
    assert [weight for weight, _ in seen] == [0.25, 0.25]
    end.close()
    assert not model._forward_hooks


def test_evaluation_and_copies_of_the_model_are_not_seen() -> None:
    model, seen = Model(), []
    end = BackwardEnd(model, seen.append)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(torch.ones(2, 3))["loss"].backward()
    model.eval()(torch.ones(2, 3))["loss"].backward()
    with torch.no_grad():
        model.train()(torch.ones(2, 3))
    assert seen == []
    end.close()


def test_an_error_raised_there_comes_out_of_backward() -> None:
    def fails(done: Pass) -> None:
        raise KeyError("mine")

    model = Model()
    end = BackwardEnd(model, fails)
    with pytest.raises(KeyError, match="mine"):
        model(torch.ones(2, 3))["loss"].backward()
    end.close()


def of_rank(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, seen = Model(), []
    end = BackwardEnd(model, lambda done: seen.append([p.grad.clone() for p in model.parameters()]))
    whole = DistributedDataParallel(model)  # kept: with it goes the reduction
    whole(torch.ones(2, 3) * (rank + 1))["loss"].backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(seen[0], model.parameters(), strict=True))
    torch.save(seen[0], Path(folder) / f"{rank}.pt")
    end.close()
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_reduced_over_ranks_by_then(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(of_rank, (port, str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
