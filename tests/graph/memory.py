"""What a training holds, counted by torch's own allocator: `python -m tests.graph.memory NAME ARM`."""

import gc
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gradwatch import Watch

from .programs import ARMS

STEPS = 50
CLASSES = 4000


class Model(nn.Module):
    """Logits far larger than all else, as a language model's are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.act(self.body(x)))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


class Count:
    """Asked after every step: how many outputs of the model are still there, how many bytes are held."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: list[weakref.ref[Tensor]] = []
        self.left: list[int] = []
        model.register_forward_hook(self.see)

    def see(self, module: nn.Module, args: Any, output: Any) -> None:
        self.left.append(sum(o() is not None for o in self.outputs))
        tensors = output.values() if isinstance(output, dict) else [output]
        self.outputs = [o for o in self.outputs if o() is not None] + [weakref.ref(t) for t in tensors]


def batch(number: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(number)
    return torch.randn(4, 16, 8, generator=made), torch.randint(0, CLASSES, (4, 16), generator=made)


def plain(options: dict[str, Any] | None, steps: int) -> tuple[list[int], Any]:
    model = Model()
    count = Count(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = None if options is None else Watch(model, optimizer, on_error="raise", **options)
    for number in range(steps):
        x, y = batch(number)
        model(x)  # a forward without a backward
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        if watch is None:
            optimizer.step()
        else:
            watch.step(loss=loss.detach(), batch=(x, y))
        optimizer.zero_grad()
    return count.left, (model, optimizer, watch)


def fabric(options: dict[str, Any] | None, steps: int) -> tuple[list[int], Any]:
    from lightning.fabric import Fabric

    from gradwatch.callbacks.fabric import GradWatch

    options = None if options is None else {k: v for k, v in options.items() if k not in ("autopsy", "conflicts_every")}
    callbacks = [] if options is None else [GradWatch(on_error="raise", verbose=False, **options)]
    runner = Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
    model = Model()
    count = Count(model)
    wrapped, optimizer = runner.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    for number in range(steps):
        x, y = batch(number)
        wrapped(x)
        if number % 2:
            runner.backward(wrapped(x, labels=y)["loss"])
        else:
            runner.backward(F.cross_entropy(wrapped(x).flatten(0, 1), y.flatten()))
        optimizer.step()
        optimizer.zero_grad()
    runner.call("on_train_end")
    return count.left, (model, optimizer, runner)


def accelerate(options: dict[str, Any] | None, steps: int) -> tuple[list[int], Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Model()
    count = Count(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    watch = None if options is None else Watch(wrapped, prepared, on_error="raise", **options)
    for number in range(steps):
        x, y = batch(number)
        loss = wrapped(x, labels=y)["loss"]
        accelerator.backward(loss)
        if watch is None:
            prepared.step()
        else:
            watch.step(loss=loss.detach())
        prepared.zero_grad()
    return count.left, (model, prepared, watch)


def lightning(automatic: bool, options: dict[str, Any] | None, steps: int) -> tuple[list[int], Any]:
    import lightning.pytorch as pl

    from gradwatch.callbacks import GradWatch

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Model(), automatic

        def training_step(self, pair: Any, number: int) -> Any:
            x, y = pair
            self.net(x)
            loss = F.cross_entropy(self.net(x).flatten(0, 1), y.flatten())
            if not automatic:
                optimizer: Any = self.optimizers()
                self.manual_backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    count = Count(module.net)
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [] if options is None else [GradWatch(on_error="raise", verbose=False, run_dir=False, **options)]
    trainer = pl.Trainer(max_epochs=1, enable_checkpointing=False, callbacks=callbacks, **quiet)
    loader = torch.utils.data.DataLoader([batch(n) for n in range(steps)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return count.left, (module, trainer, callbacks)


def hugging_face(options: dict[str, Any] | None, steps: int) -> tuple[list[int], Any]:
    import tempfile

    import transformers as hf

    from gradwatch.callbacks.transformers import GradWatchCallback

    options = None if options is None else {k: v for k, v in options.items() if k not in ("autopsy", "conflicts_every")}
    model = Model()
    count = Count(model)
    rows = [{"x": x, "labels": y} for x, y in (batch(n) for n in range(8)) for x, y in zip(x, y, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = hf.TrainingArguments(
            folder, max_steps=steps, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
        )
        callbacks = [] if options is None else [GradWatchCallback(on_error="raise", verbose=False, **options)]
        trainer = hf.Trainer(model, args, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]
        trainer.train()
    return count.left, (model, trainer)


PROGRAMS: dict[str, Callable[..., tuple[list[int], Any]]] = {
    "plain": plain,
    "fabric": fabric,
    "accelerate": accelerate,
    "lightning": lambda options, steps: lightning(True, options, steps),
    "lightning, manual": lambda options, steps: lightning(False, options, steps),
    "hf": hugging_face,
}


def held(program: Callable[..., Any], options: dict[str, Any] | None) -> dict[str, Any]:
    before = alive()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.manual_seed(0)
        left, kept = program(options, STEPS)
        gc.collect()
    more = alive() - before
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    size = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        size += event.nbytes()
        peak = max(peak, size)
    del kept
    return {"outputs left at the next forward": max(left), "tensors": more, "bytes": size, "peak": peak}


def main(name: str, arm: str) -> None:
    warnings.simplefilter("ignore")
    program, options = PROGRAMS[name], ARMS[arm]
    program(options, 3)  # what is cached for good, by torch and by us
    program(None, 3)
    print(json.dumps({"watched": held(program, options), "bare": held(program, None)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
