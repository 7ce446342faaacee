"""Modules and optimizers that are wrapped or called in other ways: parametrizations, QAT, LBFGS, SWA, accumulation."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from .data import batches, digits, generator
from .street import Street, program


@program()
def weight_and_spectral_norm(street: Street):
    """Weight norm in both forms, spectral norm with its power iteration in forward."""
    images, labels = digits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Conv2d(1, 8, 3))
    model = nn.Sequential(
        old,
        nn.ELU(),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(288, 32)),
        nn.Softplus(),
        parametrizations.weight_norm(nn.Linear(32, 10)),
    )
    optimizer = torch.optim.Adamax(model.parameters(), lr=5e-3)
    with street.watch(model, optimizer) as watch:
        for x, y in batches(images, labels, size=32, steps=street.steps):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(288, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(self.quant(x))))
        return self.dequant(self.head(x.flatten(1)))


@program(steps=55)
def qat(street: Street):
    """Fake quantisation: fused modules, observers with integer buffers; frozen late, statistics of the norm too."""
    images, labels = digits()
    quantization = torch.ao.quantization
    model = Quantised()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.fuse_modules_qat(model, [["conv", "norm", "relu"]], inplace=True)
        quantization.prepare_qat(model, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(batches(images, labels, size=32, steps=street.steps)):
            if i == street.steps * 2 // 3:
                model.apply(quantization.disable_observer)
                model.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


@program(steps=15, long=60)
def lbfgs(street: Street):
    """A closure that is called several times a step; the two halves of `watch.step` around it."""
    draw = generator()
    x = 4 * torch.rand(64, 2, generator=draw) - 2
    y = torch.sin(x[:, :1]) * x[:, 1:]
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            loss = closure()
            watch.after_backward(loss)
            optimizer.step(closure)
            watch.after_step()
            street.note(loss)
    return model, optimizer


@program(steps=55)
def swa(street: Street):
    """Two running averages (one equal, one exponential), SWA's schedule, statistics of the norms computed anew."""
    images, labels = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.PReLU(), nn.Linear(32, 10))
    equal, exponential = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=5)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(batches(images, labels, size=32, steps=street.steps)):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            exponential.update_parameters(model)
            if i >= street.steps // 2:
                equal.update_parameters(model)
                schedule.step()
            street.note(loss)
        update_bn([images[:256]], equal)
        with torch.no_grad():
            watch.validation(loss=F.cross_entropy(equal(images), labels))
    return model, equal, exponential, optimizer


@program(steps=55)
def onecycle_accumulated(street: Street):
    """Four micro-batches of a dict, OneCycle with momentum, a DataLoader, loss divided by hand."""
    images, labels = digits()
    data = [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)]
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Hardswish(inplace=True), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=street.steps)
    done = 0
    with street.watch(model, optimizer) as watch:
        while done < street.steps:
            for i, batch in enumerate(loader):
                loss = F.cross_entropy(model(batch["image"]), batch["label"]) / 4
                loss.backward()
                if i % 4 != 3:
                    watch.micro_batch(loss * 4, batch=batch)
                    continue
                watch.step(loss=loss * 4, batch=batch)
                optimizer.zero_grad()
                schedule.step()
                street.note(loss)
                done += 1
                if done == street.steps:
                    break
    return model, optimizer
