"""Runs of each door over one model, hundreds of them and ended in every way, leave no hook and no tensor."""

import gc
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from gradwatch.callbacks import GradWatch
from gradwatch.callbacks._backward_end import BackwardEnd
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback

from .hf import arguments

OPTIONS: dict[str, Any] = {"activations_every": 1, "local_norms": True, "run_dir": False, "verbose": False}
ENDS = [None, ValueError("in the loop"), KeyboardInterrupt()]
"""How a run ends, in turn."""


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(x).square().mean()}


class Fitted(pl.LightningModule):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line, self.error = line, None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.line(batch)["loss"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Raises(TrainerCallback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise self.error


def by_lightning(line: Line, error: BaseException | None, folder: Path) -> Any:
    fitted = Fitted(line)
    fitted.error = error
    quiet: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    watch = GradWatch(**OPTIONS)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, callbacks=[watch], **quiet)
    trainer.fit(fitted, DataLoader([torch.ones(4)], batch_size=1))


def by_hugging_face(line: Line, error: BaseException | None, folder: Path) -> Any:
    callbacks = [GradWatchCallback(**OPTIONS), *([] if error is None else [Raises(error)])]
    data: Any = [{"x": torch.ones(4)}]
    Trainer(line, arguments(folder, max_steps=1), train_dataset=data, callbacks=callbacks).train()


def by_fabric(line: Line, error: BaseException | None, folder: Path) -> Any:
    watch = FabricGradWatch(**OPTIONS)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[watch])
    model, optimizer = fabric.setup(line, torch.optim.SGD(line.parameters(), 0.1))
    with watch:
        fabric.backward(model(torch.ones(1, 4))["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if error is not None:
            raise error


def by_backward_end(line: Line, error: BaseException | None, folder: Path) -> Any:
    seen: list[Any] = []
    heard = Heard(seen)
    end = BackwardEnd(line, heard.hear)
    line(torch.ones(1, 4))["loss"].backward()
    assert len(seen) == 1
    if error is None:
        end.close()


class Heard:
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def hear(self, this: Any) -> None:
        self.seen.append(this)


def num_hooks(line: nn.Module) -> int:
    places = [*line.modules(), *line.parameters()]
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    on_tensors = [getattr(p, n) for p in line.parameters() for n in names]
    on_modules = [v for m in places if isinstance(m, nn.Module) for k, v in vars(m).items() if "hook" in k]
    return sum(len(hooks) for hooks in on_tensors + on_modules if isinstance(hooks, dict))


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


DOORS = {
    "lightning": by_lightning,
    "hugging-face": by_hugging_face,
    "fabric": by_fabric,
    "backward-end": by_backward_end,
}


def left_by(door: Callable[..., Any], num: int, folder: Path) -> tuple[int, int]:
    """Return how many tensors and hooks stay behind after some runs, each with another end."""
    line, held = Line(), 0
    bare = num_hooks(line)
    for number in range(num):
        with suppress(ValueError, KeyboardInterrupt, SystemExit):
            error = ENDS[number % len(ENDS)]
            door(line, None if error is None else type(error)(*error.args), folder)
        line.zero_grad()
        if number == len(ENDS) * 2 - 1:
            held = num_tensors()
    return num_tensors() - held, num_hooks(line) - bare


def left_in_its_own_process(door: str, num: int, folder: Path) -> str:
    """What a process holds changes under a test: another's garbage may be freed while this one counts."""
    program = "import sys; from tests.callbacks.test_cycles import told; told(*sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", program, door, str(num), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def told(door: str, num: str, folder: str) -> None:
    print(*left_by(DOORS[door], int(num), Path(folder)))


@pytest.mark.parametrize("door", [door for door in DOORS if door != "hugging-face"])
def test_some_runs_leave_no_hook_and_no_tensor(door: str, tmp_path: Path) -> None:
    assert left_in_its_own_process(door, 12, tmp_path) == "0 0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "num"), [("lightning", 100), ("hugging-face", 40), ("fabric", 200), ("backward-end", 1000)]
)
def test_many_runs_leave_no_hook_and_no_tensor(door: str, num: int, tmp_path: Path) -> None:
    assert left_in_its_own_process(door, num, tmp_path) == "0 0"
