"""Programs asked about on Stack Overflow that map inputs to classes; the numbers are the questions'.

Collected by Wardat et al., "DeepLocalize", ICSE 2021 (arXiv 2103.03376), and Cao et al., "DeepFD", ICSE 2022.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.random import RandomState
from torch import nn

from ._data import (
    XOR,
    binary_rows,
    glyphs,
    irises,
    one_hot,
    poisson_labels,
    scaled_features,
    shuffled,
    split,
    whole,
)
from ._losses import (
    accuracy,
    accuracy_above_half,
    explained,
    keras_binary_crossentropy,
    keras_crossentropy,
    mean_absolute,
    mean_square,
)
from ._nets import conv_net, mlp
from ._program import Problem, Program, adam, rmsprop, sgd

__all__ = ["STACK_OVERFLOW"]


def question(number: int, what: str, *faults: str, make: object) -> Program:
    """Return the program of a question: `make(faulty)` makes both twins."""
    return Program(
        f"so{number}_{what}",
        f"Stack Overflow {number}",
        faults,
        fixed=partial(make, False),
        faulty=partial(make, True),
    )


def digits_linear(faulty: bool) -> Problem:
    x, y = glyphs()
    model = mlp([784, 30, 10], ["linear", "linear"] if faulty else ["sigmoid", "softmax"], "standard_normal")
    loss = mean_square if faulty else keras_crossentropy
    return Problem.of(model, split(x, one_hot(y, 10)), loss, sgd(3.0 if faulty else 0.1), 10, 600, accuracy)


def xor(faulty: bool) -> Problem:
    model = mlp([2, 4, 1], ["sigmoid"] * 2, "glorot") if faulty else mlp([2, 8, 1], ["tanh", "sigmoid"], "glorot")
    loss = mean_absolute if faulty else keras_binary_crossentropy
    optimizer = sgd(0.05, momentum=0.11, nesterov=True) if faulty else adam(0.05)
    return Problem.of(model, whole(*XOR), loss, optimizer, 4, 1000, accuracy_above_half)


def xor_softmax(faulty: bool) -> Problem:
    x = np.array([[1, 1], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0]], np.float32)
    y = np.array([[0], [0], [1], [1], [0], [0]], np.float32)
    if faulty:
        model = mlp([2, 2, 3, 1], ["sigmoid", "sigmoid", "softmax"], "uniform")
        loss, optimizer = mean_square, sgd(0.001, momentum=0.9, nesterov=True)
    else:
        model = mlp([2, 8, 8, 1], ["tanh", "tanh", "sigmoid"], "glorot")
        loss, optimizer = keras_binary_crossentropy, adam(0.02)
    return Problem.of(model, whole(x, y), loss, optimizer, 32, 600, accuracy_above_half)


def softmax_on_one_unit(faulty: bool) -> Problem:
    y = RandomState(0).randint(0, 2, 2000).astype(np.float32)[:, None]
    x = np.repeat(y, 128, 1)
    model = mlp([128, 50, 50, 1], ["relu", "relu", "softmax" if faulty else "sigmoid"], "glorot", dropout=0.2)
    data = split(x, y)
    return Problem.of(model, data, keras_binary_crossentropy, rmsprop(1e-3), 16, 300, accuracy_above_half)


def short_training(faulty: bool) -> Problem:
    random = RandomState(0)
    low, high = random.uniform(0.2, 0.4, (100, 2)), random.uniform(0.5, 0.7, (100, 2))
    x, y = shuffled(np.concatenate([low, high]).astype(np.float32), np.repeat([0, 1], 100), random)
    model = mlp([2, 2, 2], ["sigmoid", "softmax"], "glorot")
    lr, steps = (0.001, 35) if faulty else (0.05, 400)
    return Problem.of(model, whole(x, one_hot(y, 2)), keras_crossentropy, adam(lr), 32, steps, accuracy)


def many_labels(faulty: bool) -> Problem:
    activations = ["relu", "relu", "softmax" if faulty else "sigmoid"]
    model = mlp([20, 20, 20, 3], activations, "glorot", dropout=0.5 if faulty else 0.0)
    loss = mean_square if faulty else keras_binary_crossentropy
    return Problem.of(model, split(*poisson_labels()), loss, sgd(0.01), 20, 1000, accuracy_above_half)


def bits(faulty: bool) -> Problem:
    if faulty:
        model, loss, optimizer = mlp([8, 8, 8, 8], ["sigmoid"] * 3, "normal"), mean_square, sgd(0.01)
    else:
        model = mlp([8, 128, 128, 8], ["relu", "relu", "sigmoid"], "he_uniform")
        loss, optimizer = keras_binary_crossentropy, adam(5e-3)
    return Problem.of(model, whole(*binary_rows()), loss, optimizer, 50, 1500, accuracy_above_half)


def unscaled_relu(faulty: bool) -> Problem:
    x, y = scaled_features()
    x = x if faulty else (x - x.mean(0)) / x.std(0)
    model = mlp([11, 12, 12, 1], ["relu", "relu", "relu" if faulty else "sigmoid"], "normal" if faulty else "glorot")
    optimizer = adam(1e-3 if faulty else 1e-2)
    return Problem.of(model, split(x, y), keras_binary_crossentropy, optimizer, 5, 1000, accuracy_above_half)


def iris_sigmoid(faulty: bool) -> Problem:
    x, y = irises()
    if faulty:
        model = mlp([4, 4, 3], ["relu", "sigmoid"], "normal")
    else:
        x = (x - x.min(0)) / (x.max(0) - x.min(0))
        model = mlp([4, 8, 8, 3], ["relu", "relu", "softmax"], "glorot")
    optimizer = adam(1e-3 if faulty else 5e-3)
    return Problem.of(model, split(x, one_hot(y, 3)), keras_crossentropy, optimizer, 5, 1500, accuracy)


def raw_pixels(faulty: bool) -> Problem:
    x, y = glyphs()
    model = mlp([784, 784, 50, 10], ["linear", "relu", "sigmoid" if faulty else "softmax"], "glorot")
    data = split(x * 255 if faulty else x, one_hot(y, 10))
    return Problem.of(model, data, keras_crossentropy, sgd(1e-4) if faulty else adam(1e-3), 32, 400, accuracy)


def conv_relu_output(faulty: bool) -> Problem:
    x, y = glyphs(1500)
    model = conv_net(nn.ReLU() if faulty else nn.Softmax(-1))
    data = split(x * 255 if faulty else x, one_hot(y, 10))
    return Problem.of(model, data, keras_crossentropy, adam(1e-3), 50, 300, accuracy)


def divided_labels(faulty: bool) -> Problem:
    x, y = glyphs()
    # Training labels divided by 255 along with the pixels: all of them become class 0.
    taught = one_hot(y // 255 if faulty else y, 10)
    x_train, _, x_val, y_val = split(x, one_hot(y, 10))
    model = mlp([784, 128, 10], ["relu", "softmax"], "glorot")
    data = (x_train, taught[: len(x_train)], x_val, y_val)
    return Problem.of(model, data, keras_crossentropy, adam(1e-3), 32, 300, accuracy)


def threshold_softmax(faulty: bool) -> Problem:
    x = RandomState(0).randint(0, 100, (2000, 1)).astype(np.float32)
    y = (x > 50).astype(np.float32)
    if faulty:
        model = mlp([1, 1, 1], ["sigmoid", "softmax"], ["glorot", "normal"])
    else:
        x = (x - 50) / 29
        model = mlp([1, 4, 1], ["tanh", "sigmoid"], "glorot")
    loss = mean_absolute if faulty else keras_binary_crossentropy
    optimizer = rmsprop(1e-3 if faulty else 1e-2)
    return Problem.of(model, split(x, y), loss, optimizer, 200, 500, accuracy_above_half)


def three_of_69(faulty: bool) -> Problem:
    token = RandomState(0).randint(0, 69, (1500, 1))
    y = np.zeros((1500, 69), np.float32)
    for k in range(3):
        y[np.arange(1500), (token[:, 0] + 7 * k) % 69] = 1
    if faulty:
        x, model = token.astype(np.float32), mlp([1, 69, 69, 69], ["relu", "relu", "softmax"], "normal")
    else:
        x, model = one_hot(token[:, 0], 69), mlp([69, 69, 69], ["relu", "sigmoid"], "glorot")
    loss = keras_crossentropy if faulty else keras_binary_crossentropy
    return Problem.of(model, split(x, y), loss, adam(1e-3 if faulty else 1e-2), 50, 500, explained)


STACK_OVERFLOW = (
    question(48385830, "linear_lr3", "learning_rate_high", "output_activation", "exploding", make=digits_linear),
    question(31556268, "xor_mae", "wrong_loss", "vanishing", "learning_rate_low", make=xor),
    question(34311586, "softmax1", "softmax_on_one_unit", make=xor_softmax),
    question(31880720, "softmax1_bce", "softmax_on_one_unit", make=softmax_on_one_unit),
    question(50306988, "underfit_lr_epochs", "learning_rate_low", make=short_training),
    question(38648195, "multilabel_softmax_mse", "output_activation", "wrong_loss", make=many_labels),
    question(39217567, "bits_sigmoid", "vanishing", "learning_rate_low", make=bits),
    question(44066044, "relu_bce_unscaled", "unnormalised_input", "output_activation", make=unscaled_relu),
    question(59278771, "iris_sigmoid_cce", "output_activation", "unnormalised_input", make=iris_sigmoid),
    question(55328966, "unnorm_sigmoid_cce", "unnormalised_input", "output_activation", make=raw_pixels),
    question(47352366, "cnn_relu_out", "output_activation", "unnormalised_input", make=conv_relu_output),
    question(59325381, "labels_div255", "labels", make=divided_labels),
    question(45442843, "softmax1_mae", "softmax_on_one_unit", make=threshold_softmax),
    question(58609115, "multilabel_softmax", "output_activation", "wrong_loss", make=three_of_69),
)
