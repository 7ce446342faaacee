"""Under modes that reach everywhere: anomaly detection, dispatch modes, defaults, no_grad, workers, a wayward model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from .data import batches, digits, generator
from .street import Street, program


def net(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


def train(street: Street, model: nn.Module, data: Any):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with street.watch(model, optimizer) as watch:
        for x, y in data:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch=(x, y))
            street.note(loss)
    return model, optimizer


@program()
def anomaly_detected(street: Street):
    """`detect_anomaly`, and deterministic algorithms only: what has none raises."""
    torch.use_deterministic_algorithms(True)
    with torch.autograd.detect_anomaly(check_nan=True):
        return train(street, net(), batches(*digits(), size=32, steps=street.steps))


@program()
def double_by_default(street: Street):
    """The default dtype is float64 where the watch begins, and float32 again later."""
    torch.set_default_dtype(torch.float64)
    images, labels = digits()
    model = net()
    torch.set_default_dtype(torch.float32)
    return train(street, model, batches(images.double(), labels, size=32, steps=street.steps))


class Counted(TorchDispatchMode):
    """Counts operations, as counters of floating-point operations and of memory do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@program(saved=False)
def counted_operations(street: Street):
    """The user counts the operations of forward and backward: there are as many as without a watch."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    counted = Counted()
    with street.watch(model, optimizer) as watch:
        for x, y in batches(*digits(), size=32, steps=street.steps):
            with counted:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
            street.note(loss, counted.count)
    return model, optimizer


@program()
def stepped_under_no_grad(street: Street):
    """The step lies in a function without gradients; validation in inference mode and in half precision, by a copy."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    @torch.no_grad()
    def step(watch: Any, loss: Tensor) -> None:
        watch.step(loss=loss.detach())

    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(batches(*digits(), size=32, steps=street.steps)):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            step(watch, loss)
            street.note(loss)
            if i % 10 == 9:
                model.eval()
                with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                    held = F.cross_entropy(model(x), y)
                watch.validation(loss=held, accuracy=0.5)
                model.train()
    return model, optimizer


@program()
def loader_with_workers(street: Street):
    """Batches come from worker processes that are forked while the model is watched."""
    data = TensorDataset(*digits())
    loader = DataLoader(data, 32, shuffle=True, num_workers=2, generator=generator(), persistent_workers=False)

    def some() -> Any:
        left = street.steps
        while left:
            for batch in loader:
                yield batch
                left -= 1
                if not left:
                    return

    return train(street, net(), some())


class Wayward(nn.Module):
    """Looks attributes up in its child, keeps its norm in eval whatever is asked, and has a property that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    @property
    def device(self) -> torch.device:
        raise RuntimeError("there is no such thing here")

    def train(self, mode: bool = True) -> Wayward:
        super().train(mode)
        self.inner[2].eval()
        return self

    def __len__(self) -> int:
        return 0  # a model that is false

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.inner(*args, **kwargs)


@program()
def wayward_model(street: Street):
    return train(street, Wayward().train(), batches(*digits(), size=32, steps=street.steps))
