"""A step's window is the step: the norm on record is that of the gradient that the optimizer gets, however it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.treatments import ClipByGlobalNorm


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(i)
        return {"x": torch.randn(8, generator=g), "labels": torch.randn(1, generator=g)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out} if labels is not None else {"logits": out}


def halves(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, 8)):
        loss = model(**{k: v[part] for k, v in inputs.items()})["loss"] / 2
        trainer.accelerator.backward(loss)
        total += loss.detach()
    return total


def retained(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    loss = model(**inputs)["loss"]
    for _ in range(2):
        trainer.accelerator.backward(loss, retain_graph=True)
    return loss.detach()


def two_losses(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    trainer.accelerator.backward(out["loss"], retain_graph=True)
    trainer.accelerator.backward(out["logits"].abs().mean())
    return out["loss"].detach()


def own_loss(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    loss = (model(**inputs)["logits"] - 2 * inputs["labels"]).square().mean()
    trainer.accelerator.backward(loss)
    return loss.detach()


def cached(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Representations first, their gradients by an inner backward, then each part again with its gradient."""
    with torch.no_grad():
        found = model(inputs["x"])["logits"]
    leaf = found.detach().requires_grad_()
    loss = (leaf - inputs["labels"]).square().mean()
    loss.backward()
    assert leaf.grad is not None
    for part in (slice(0, 3), slice(3, 6), slice(6, 8)):
        out = model(inputs["x"][part])["logits"]
        trainer.accelerator.backward((out * leaf.grad[part]).sum())
    return loss.detach()


def now_and_then(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    if trainer.state.global_step % 3 == 1:
        return halves(trainer, model, inputs)
    loss = model(**inputs)["loss"]
    trainer.accelerator.backward(loss)
    return loss.detach()


def penalty(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    x = inputs["x"].clone().requires_grad_()
    out = model(x, inputs["labels"])
    (slope,) = torch.autograd.grad(out["logits"].sum(), x, create_graph=True)
    loss = out["loss"] + slope.norm()
    trainer.accelerator.backward(loss)
    return loss.detach()


def evaluated(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    loss = model(**inputs)["loss"]
    model.eval()
    with torch.no_grad():
        model(**inputs)
    model.train()
    trainer.accelerator.backward(loss)
    return loss.detach()


PROGRAMS = [halves, retained, two_losses, own_loss, cached, now_and_then, penalty, evaluated]


def train(program: Any, folder: Path, watch: GradWatchCallback, *, clip: float, accumulate: int) -> list[float]:
    true: list[float] = []

    class Own(Trainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
            model.train()
            loss: Tensor = program(self, model, inputs)
            true.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
            return loss

    args = TrainingArguments(
        str(folder), max_steps=6, report_to=[], use_cpu=True, max_grad_norm=clip, disable_tqdm=True, save_strategy="no",
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    with watch:
        Own(Model(), args, train_dataset=Data(), callbacks=[watch]).train()
    return true[accumulate - 1 :: accumulate]


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 0.01], ids=["no-clip", "clipped"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_the_norm_is_that_of_all_backwards_together(program: Any, clip: float, tmp_path: Path) -> None:
    watch = GradWatchCallback(run_dir=False, sinks=(), verbose=False, on_error="raise", activations_every=1)
    true = train(program, tmp_path, watch, clip=clip, accumulate=1)
    assert [r.global_norm for r in watch.history] == pytest.approx(true, rel=1e-3)
    assert [r.step for r in watch.history] == list(range(6))
    assert watch.incidents == []


def test_the_norm_is_that_of_all_micro_batches_and_their_backwards(tmp_path: Path) -> None:
    watch = GradWatchCallback(run_dir=False, sinks=(), verbose=False, on_error="raise")
    true = train(halves, tmp_path, watch, clip=0.01, accumulate=2)
    assert [r.global_norm for r in watch.history] == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("program", [halves, cached, retained], ids=lambda p: p.__name__)
def test_treatments_act_once_on_the_whole(program: Any, tmp_path: Path) -> None:
    watch = GradWatchCallback(
        run_dir=False, sinks=(), verbose=False, on_error="raise", treatments=[ClipByGlobalNorm(0.1)]
    )
    true = train(program, tmp_path, watch, clip=0.0, accumulate=1)
    # In the first window nobody knows yet how many come: it is treated just before the step.
    assert true[0] > 0.1
    assert true[1:] == pytest.approx([0.1] * 5, rel=1e-3)
    assert [r.global_norm_after for r in watch.history] == pytest.approx([0.1] * 6, rel=1e-3)
    assert all(r.global_norm > 0.5 for r in watch.history)
    assert all(len(r.treatments) == 1 for r in watch.history)
