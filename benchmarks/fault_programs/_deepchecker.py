"""Synthetic faults: each is one change to a regression network or an image network that is sound without it.

Ben Braiek and Khomh, "Testing Feedforward Neural Networks Training Programs", TOSEM 2022 (arXiv 2204.00694).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ._data import glyphs, one_hot, split, table
from ._losses import Loss, accuracy, cross_entropy, explained, mean_square, negated, weight_penalty
from ._nets import mlp
from ._program import MakeOptimizer, Problem, Program, adam, sgd

__all__ = ["DEEP_CHECKER", "image_net", "table_net"]

Change = Callable[[NDArray], NDArray]


def _same(array: NDArray) -> NDArray:
    return array


def _always_same(loss: Loss) -> Loss:
    return loss


def broadcast_mean_square(p: Tensor, y: Tensor) -> Tensor:
    """Predictions (n, 1) against targets (n,): the difference is (n, n)."""
    return ((p - y[:, 0]) ** 2).mean()


def crossentropy_of_numbers(p: Tensor, y: Tensor) -> Tensor:
    return -(y * p.clamp(1e-10, 1).log()).sum()


def softmax_twice(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(functional.softmax(logits, -1), y)


def crossentropy_without_softmax(logits: Tensor, y: Tensor) -> Tensor:
    return -(y * logits.clamp(1e-32, 1).log()).sum(-1).mean()


def softmax_over_batch(logits: Tensor, y: Tensor) -> Tensor:
    return -(y * functional.softmax(logits, 0).clamp(1e-32, 1).log()).sum(1).mean()


def mean_square_of_softmax(logits: Tensor, y: Tensor) -> Tensor:
    return mean_square(functional.softmax(logits, -1), y)


def summed_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -(y * functional.log_softmax(logits, -1)).sum()


def table_net(
    *,
    optimizer: MakeOptimizer | None = None,
    init: str = "he_normal",
    std: float = 0.05,
    output: str = "linear",
    loss: Loss = mean_square,
    change_loss: Callable[[Loss], Loss] = _always_same,
    penalty: float = 1e-5,
    inputs: Change = _same,
    targets: Change = _same,
    mix_inputs: bool = False,
) -> Problem:
    """Regression of one number on nine features; sound with the default arguments."""
    x, y = table()
    x, y = inputs(x), targets(y)
    if mix_inputs:
        # Training rows alone lose their order: features no longer belong to their targets.
        x[:274] = x[:274][RandomState(1).permutation(274)]
    model = mlp([9, 64, 64, 1], ["relu", "relu", output], [init, init, "glorot"], std=std)
    total = change_loss(weight_penalty(loss, model, penalty))
    return Problem.of(model, split(x, y), total, optimizer or adam(1e-3), 32, 1500, explained)


def image_net(
    *,
    optimizer: MakeOptimizer | None = None,
    width: int = 128,
    hidden: str = "relu",
    init: str = "he_normal",
    loss: Loss = cross_entropy,
    change_loss: Callable[[Loss], Loss] = _always_same,
    penalty: float = 1e-5,
    inputs: Change = _same,
    labels: Change = _same,
) -> Problem:
    """Ten classes of images, logits out; sound with the default arguments. Validation labels are always right."""
    x, y = glyphs()
    last = init if init == "constant" else "glorot"
    model = mlp([784, width, width, 10], [hidden, hidden, "linear"], [init, init, last])
    x_train, _, x_val, y_val = split(inputs(x), one_hot(y, 10))
    taught = one_hot(labels(y), 10)[: len(x_train)]
    total = change_loss(weight_penalty(loss, model, penalty))
    return Problem.of(model, (x_train, taught, x_val, y_val), total, optimizer or sgd(0.1), 64, 400, accuracy)


def regression(what: str, *faults: str, **changes: Any) -> Program:
    faulty = partial(table_net, **changes)
    return Program(f"tdc_regr_{what}", f"TheDeepChecker regression {what}", faults, fixed=table_net, faulty=faulty)


def image(what: str, *faults: str, **changes: Any) -> Program:
    faulty = partial(image_net, **changes)
    return Program(f"tdc_img_{what}", f"TheDeepChecker image {what}", faults, fixed=image_net, faulty=faulty)


_SCALES = np.array([8, 455, 230, 5140, 24, 82, 1, 1, 1])
_SHIFTS = np.array([3, 68, 46, 1613, 8, 70, 0, 0, 0])

DEEP_CHECKER = (
    regression("high_lr", "learning_rate_high", optimizer=adam(0.1)),
    regression("low_lr", "learning_rate_low", optimizer=adam(1e-5)),
    regression("const_init", "symmetry", init="constant"),
    regression("rand_init_std", "initialisation", init="normal", std=0.25),
    regression("over_reg", "regularisation", penalty=1.0),
    regression("flip_sign", "loss_sign", change_loss=negated),
    regression("softmax1", "softmax_on_one_unit", output="softmax"),
    regression("sigmoid_out_pm1", "output_activation", output="sigmoid", targets=lambda y: 2 * y - 1),
    regression("dbl_norm", "tiny_input", inputs=lambda x: x / 255),
    regression("miss_norm", "unnormalised_input", inputs=lambda x: x * _SCALES + _SHIFTS),
    regression("target_x10_unscaled", "unscaled_targets", targets=lambda y: 10 * (9 + 37 * y)),
    regression("wrong_labels_shuffle", "labels", mix_inputs=True),
    regression("broadcast_loss", "shape_broadcast", loss=broadcast_mean_square),
    regression("low_eps", "epsilon", optimizer=adam(1e-3, eps=1e-16)),
    regression("ce_for_regression", "wrong_loss", loss=crossentropy_of_numbers),
    image("high_lr", "learning_rate_high", optimizer=sgd(2.0), width=256),
    image("low_lr", "learning_rate_low", optimizer=sgd(0.001)),
    image("flip_sign", "loss_sign", change_loss=negated),
    image("softmax_hidden", "vanishing", "hidden_activation", hidden="softmax"),
    image("const_init", "symmetry", init="constant"),
    image("double_softmax", "wrong_loss", loss=softmax_twice),
    image("no_softmax", "wrong_loss", "output_activation", loss=crossentropy_without_softmax),
    image("softmax_axis0", "wrong_loss", loss=softmax_over_batch),
    image("mse_loss", "wrong_loss", loss=mean_square_of_softmax),
    image("miss_norm", "unnormalised_input", inputs=lambda x: x * 255),
    image("over_reg", "regularisation", penalty=0.3),
    image("adam_lr.1_eps1e-16", "learning_rate_high", "epsilon", optimizer=adam(0.1, eps=1e-16)),
    image("wrong_labels", "labels", labels=lambda y: RandomState(3).permutation(y)),
    image("sum_reduction", "loss_reduction", "learning_rate_high", loss=summed_cross_entropy),
)
