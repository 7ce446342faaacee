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


def left_in_a_process_of_their_own(num: dict[str, int], folder: Path) -> dict[str, str]:
    """What a process holds changes under a test: another's garbage may be freed while this one counts."""
    program = "import sys; from tests.callbacks.test_cycles import told; told(*sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder), *(f"{k}={v}" for k, v in num.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (line.removeprefix("left by ") for line in done.stdout.splitlines() if line.startswith("left by "))
    return dict(line.split(": ") for line in lines)


def told(folder: str, *doors: str) -> None:
    for door, num in (text.split("=") for text in doors):
        tensors, hooks = left_by(DOORS[door], int(num), Path(folder))
        print(f"left by {door}: {tensors} tensors, {hooks} hooks")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_leave_no_hook_and_no_tensor(tmp_path: Path) -> None:
    num = {"lightning": 100, "hugging-face": 40, "fabric": 200, "backward-end": 1000}
    left = left_in_a_process_of_their_own(num, tmp_path)
    assert left == dict.fromkeys(num, "0 tensors, 0 hooks")
