"""Programs asked about on Stack Overflow that map inputs to numbers."""

from __future__ import annotations

import numpy as np
from numpy.random import RandomState

from ._data import split, whole
from ._losses import explained, mean_square
from ._nets import mlp
from ._program import Problem, adam, sgd
from ._stackoverflow import question

__all__ = ["STACK_OVERFLOW_REGRESSION"]


def softmax_regression(faulty: bool) -> Problem:
    x = (RandomState(0).rand(4000, 3) * 10000).astype(np.float32)
    y = (x @ np.array([2, 1, 0.5], np.float32) + 2.2)[:, None].astype(np.float32)
    if faulty:
        model = mlp([3, 3, 2, 1], ["tanh", "tanh", "softmax"], "uniform", dropout=0.5)
        optimizer = sgd(0.1, momentum=0.9, nesterov=True)
    else:
        x, y = (x - 5000) / 2887, (y - y.mean()) / y.std()
        model, optimizer = mlp([3, 16, 1], ["tanh", "linear"], "glorot"), sgd(0.02, momentum=0.9)
    return Problem.of(model, split(x, y), mean_square, optimizer, 32, 500, explained)


def parabola(faulty: bool) -> Problem:
    x = np.arange(0, 5, 0.1, dtype=np.float32)[:, None]
    y = (5 * x**2 + RandomState(0).randn(50, 1) ** 3).astype(np.float32)
    model = mlp([1, 50, 30, 1], ["relu", "relu", "linear"], ["glorot", "uniform", "glorot"])
    return Problem.of(model, whole(x, y), mean_square, sgd(0.1 if faulty else 0.001), 32, 2000, explained)


def fourth_power(faulty: bool) -> Problem:
    x = np.arange(-100, 100, 0.5, dtype=np.float32)[:, None]
    y = x**4
    if not faulty:
        x, y = x / 57.7, (y - y.mean()) / y.std()
    model = mlp([1, 50, 50, 1], ["sigmoid", "elu", "linear"], "glorot")
    return Problem.of(model, whole(x, y), mean_square, adam(1e-3 if faulty else 1e-2), 400, 1000, explained)


def line_sigmoid(faulty: bool) -> Problem:
    random = RandomState(0)
    x = random.rand(200, 1).astype(np.float32) * 10
    y = (5 * x + 20 + random.randn(200, 1)).astype(np.float32)
    model = mlp([1, 5, 1], ["sigmoid", "sigmoid" if faulty else "linear"], "glorot")
    return Problem.of(model, split(x, y), mean_square, sgd(0.01), 140, 1000 if faulty else 3000, explained)


def signed_relu(faulty: bool) -> Problem:
    x = RandomState(0).randn(300, 2).astype(np.float32)
    y = np.tanh(x @ np.array([[1.0], [-1.0]])).astype(np.float32) * np.float32(0.9)
    model = mlp([2, 4, 1], ["relu", "relu" if faulty else "tanh"], "glorot")
    return Problem.of(model, split(x, y), mean_square, sgd(0.01 if faulty else 0.1), 10, 1000, explained)


STACK_OVERFLOW_REGRESSION = (
    question(33969059, "reg_softmax", "softmax_on_one_unit", "unnormalised_input", make=softmax_regression),
    question(48934338, "lr0.1", "learning_rate_high", make=parabola),
    question(52800582, "x4_unscaled", "unnormalised_input", "unscaled_targets", make=fourth_power),
    question(48221692, "reg_sigmoid_out", "output_activation", make=line_sigmoid),
    question(48251943, "reg_relu_out", "output_activation", make=signed_relu),
)
