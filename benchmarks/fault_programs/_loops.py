"""Bugs of the training loop, after TrainCheck (OSDI 2025) and the questions it drew on, and TensorFlow programs of
Zhang et al., "An Empirical Study on TensorFlow Program Bugs", ISSTA 2018 (IPS_n)."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
from numpy.random import RandomState
from torch import Tensor, nn
from torch.optim import SGD

from ._data import glyphs, one_hot, split, whole
from ._deepchecker import image_net
from ._losses import accuracy, cross_entropy, explained, mean_square, sum_square
from ._nets import Detach, mlp, zero_linear
from ._program import Problem, Program, adam, sgd

__all__ = ["LOOPS"]


def never_zeroed() -> Problem:
    return image_net().but(zero_grad=False)


def frozen() -> Problem:
    problem = image_net()
    problem.model.requires_grad_(False)
    return problem


def stale_optimizer() -> Problem:
    """The optimizer is made from a model that is then replaced by a copy."""
    return image_net().but(optimizer=lambda model: SGD(copy.deepcopy(model).parameters(), lr=0.1))


def detached_trunk() -> Problem:
    problem = image_net()
    layers = list(problem.model)
    return problem.but(model=nn.Sequential(*layers[:-1], Detach(), layers[-1]))


def half_mean_square(p: Tensor, y: Tensor) -> Tensor:
    return 0.5 * mean_square(p, y)


def linear_regression(faulty: bool) -> Problem:
    x = np.stack([np.arange(100), np.ones(100)], 1).astype(np.float32)
    y = (x @ np.array([[2.0], [4.0]]) + 10 * RandomState(0).rand(100, 1)).astype(np.float32)
    if not faulty:
        x[:, 0] = (x[:, 0] - 49.5) / 29
    return Problem.of(zero_linear(2, bias=False), whole(x, y), half_mean_square, sgd(0.5), 100, 300, explained)


def quadratic(lr: float) -> Problem:
    x = np.arange(4, dtype=np.float32)[:, None]
    data = whole(np.concatenate([x**2, x], 1), x**2)
    return Problem.of(zero_linear(2), data, sum_square, sgd(lr), 4, 3000, explained)


def eight_points(lr: float) -> Problem:
    random = RandomState(3)
    x = random.uniform(-8, 8, (8, 1)).astype(np.float32)
    y = (3.1 * x - 2 + random.uniform(-1, 1, (8, 1))).astype(np.float32)
    return Problem.of(zero_linear(1), whole(x, y), mean_square, sgd(lr), 8, 500, explained)


def wide_digits(init: str) -> Problem:
    x, y = glyphs()
    model = mlp([784, 500, 500, 10], ["relu", "relu", "linear"], init)
    return Problem.of(model, split(x, one_hot(y, 10)), cross_entropy, adam(1e-3), 100, 200, accuracy)


def summed_log(p: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of probabilities with nothing to keep log(0) away."""
    return -(y * p.log()).sum()


def clamped_log(p: Tensor, y: Tensor) -> Tensor:
    return -(y * p.clamp(1e-8, 1).log()).sum(-1).mean()


def softmax_regression(faulty: bool) -> Problem:
    x, y = glyphs()
    model = mlp([784, 10], ["softmax"], "normal", std=1.0)
    loss, lr = (summed_log, 0.01) if faulty else (clamped_log, 0.1)
    return Problem.of(model, split(x, one_hot(y, 10)), loss, sgd(lr), 100, 400, accuracy)


def loop_bug(what: str, source: str, fault: str, faulty: object) -> Program:
    return Program(f"loop_{what}", source, (fault,), fixed=image_net, faulty=faulty)


def tensorflow_bug(number: int, what: str, *faults: str, fixed: object, faulty: object) -> Program:
    return Program(f"ips{number}_{what}", f"IPS_{number}", faults, fixed=fixed, faulty=faulty)


LOOPS = (
    loop_bug("missing_zero_grad", "Stack Overflow 60335387, TrainCheck", "gradients_kept", never_zeroed),
    loop_bug("frozen_params", "PyTorch forum 84911, TrainCheck", "frozen", frozen),
    loop_bug("stale_optimizer", "TrainCheck", "stale_optimizer", stale_optimizer),
    loop_bug("detached_trunk", "a common bug", "detached", detached_trunk),
    tensorflow_bug(
        15,
        "linreg_diverge",
        "learning_rate_high",
        "unnormalised_input",
        fixed=partial(linear_regression, False),
        faulty=partial(linear_regression, True),
    ),
    tensorflow_bug(
        17,
        "quadratic_sum_lr",
        "learning_rate_high",
        "loss_reduction",
        fixed=partial(quadratic, 0.001),
        faulty=partial(quadratic, 0.01),
    ),
    tensorflow_bug(
        5, "linreg_lr", "learning_rate_high", fixed=partial(eight_points, 0.01), faulty=partial(eight_points, 0.1)
    ),
    tensorflow_bug(
        4,
        "stdnormal_init",
        "initialisation",
        "exploding",
        fixed=partial(wide_digits, "he_normal"),
        faulty=partial(wide_digits, "standard_normal"),
    ),
    tensorflow_bug(
        14,
        "log_softmax_nan",
        "log_of_zero",
        "exploding",
        fixed=partial(softmax_regression, False),
        faulty=partial(softmax_regression, True),
    ),
)
