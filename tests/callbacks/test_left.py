"""A trainer's loop that is left by an exception leaves no hook of ours, whoever else failed on the way."""

import json

import pytest
import torch
from torch import nn

from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.transformers import GradWatchCallback

from .hf import bert, trainer

pl = pytest.importorskip("lightning.pytorch")


def hooks_on(model):
    return sum(len(v) for m in model.modules() for k, v in vars(m).items() if "hook" in k and isinstance(v, dict))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hugging_face_trainer_fails_and_no_hook_is_left(tmp_path, error):
    model, calls = bert(), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:
            raise error("mine")

    model.classifier.register_forward_pre_hook(fail)
    before = hooks_on(model)
    watch = GradWatchCallback(run_dir=tmp_path / "run", verbose=False, activations_every=1)
    training = trainer(tmp_path, watch, model=model)
    with pytest.raises(error, match="mine"):
        training.train()
    assert hooks_on(model) == before
    assert json.loads((tmp_path / "run/meta.json").read_text())["sessions"][-1]["ended"] == "crashed or interrupted"
    assert len(watch.history) == 4


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, index):
        if index == 3:
            raise RuntimeError("mine")
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Fails(pl.Callback):
    def on_exception(self, *_):
        raise ValueError("another callback's")


@pytest.mark.parametrize(
    ("others", "ended"), [([], "crashed: RuntimeError: mine"), ([Fails()], "crashed or interrupted")]
)
def test_a_lightning_fit_fails_and_no_hook_is_left(tmp_path, others, ended):
    watch, module = GradWatch(run_dir=tmp_path / "run", verbose=False, activations_every=1), Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = pl.Trainer(
        callbacks=[*others, watch], max_epochs=1, enable_checkpointing=False, accelerator="cpu", **quiet
    ).fit
    data = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4)
    with pytest.raises((RuntimeError, ValueError)):
        fit(module, data)
    assert hooks_on(module) == 0
    assert json.loads((tmp_path / "run/meta.json").read_text())["sessions"][-1]["ended"] == ended


@pytest.mark.slow
def test_the_launching_process_knows_of_a_training_in_forked_ranks(tmp_path):
    import subprocess
    import sys

    program = f"""
import lightning.pytorch as pl, torch
from torch import nn
from gradwatch.callbacks import GradWatch
class Module(pl.LightningModule):
    def __init__(self): super().__init__(); self.net = nn.Linear(8, 1)
    def training_step(self, batch, index): return self.net(batch).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.05)
watch = GradWatch(verbose=False)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
options = dict(accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, default_root_dir="root")
loader = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4)
pl.Trainer(callbacks=[watch], **options, **quiet).fit(Module(), loader)
assert watch.run_dir is not None
assert len(watch.history) == 4, len(watch.history)
assert "no training has begun" not in watch.summary()
assert watch.incidents is not None
assert watch.report({str(tmp_path / "report.html")!r}).exists()
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
