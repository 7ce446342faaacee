"""A batch taken apart: one more forward and backward, whose graph tells the samples from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ._finite import FirstBad
from ._halving import halve
from ._losses import LossCall, LossCalls
from ._norms import Measured, measure
from ._parts import Maker, part_of, unpacked
from ._result import PerSample
from ._rows import flat_rows
from ._uses import Use, are_coupled, find_uses

__all__ = ["Begun", "take_apart"]

_ENOUGH = 0.9
"""Share of the gradient's square that must be told apart; below, a few samples are looked for by halving."""
_TOLERANCE, _EXACT = 0.02, 1e-3
"""Relative error of projections that may be of rounding, and from which on another dimension is tried."""


@dataclass
class Begun:
    """What a forward pass has made, and where its backward begins.

    Attributes:
        roots: outputs that backward begins at.
        grads: the gradient of each; None of a scalar: 1.
        losses: how the loss was made, where that is known.
    """

    roots: list[Tensor]
    grads: list[Tensor | None]
    losses: list[LossCall] = field(default_factory=list)


def take_apart(
    model: nn.Module,
    begin: Callable[[], Begun],
    params: Sequence[Tensor],
    size: int,
    *,
    direction: Sequence[Tensor | None] | None = None,
) -> PerSample:
    """Return losses and gradients of the samples of a batch, from one forward and two backward passes.

    The graph of the forward pass tells which operations use a parameter. What backward hands to each, and what it kept,
    makes the norm of every sample's gradient without making that gradient. A second backward, of every other sample
    alone, must come to what their rows say: a parameter where it does not counts as not told apart. (Not so with batch
    normalisation, through which samples' losses act on each other's rows: there it is the rows that are told.)

    Args:
        model: that is run.
        begin: runs forward.
        params: what to differentiate by.
        size: samples in the batch, B.
        direction: what samples' gradients are projected on, for each parameter; None: the sum of them all.

    Raises:
        ValueError: nothing of the gradient reaches a parameter.
    """
    wanted = [p for p in params if p.requires_grad]
    given = None if direction is None else [d for p, d in zip(params, direction, strict=True) if p.requires_grad]
    # The user's hooks on saved tensors (a count, an offload) are not for this; `enable_grad`: an optimizer steps.
    with saved_tensors_hooks(Tensor.detach, unpacked), torch.enable_grad(), _plain_recurrence(model):
        first = FirstBad(size)
        with LossCalls() as seen, first.looking(model):
            begun = begin()
        begun.losses += seen.calls
        found = _Batch(begun, wanted, given, size).result()
    return found if first.rows is None else replace(found, is_finite=~first.rows)


@contextmanager
def _plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Let recurrent layers run as single operations: fused, they are one of which nobody sees the inside."""
    with ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
            for backend in backends:
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False
        yield


class _Batch:
    def __init__(self, begun: Begun, params: list[Tensor], given: Any, size: int) -> None:
        self.begun, self.params, self.size = begun, params, size
        self.rows = self._row_tensors()
        self.makers: dict[int, list[tuple[Use, Maker | None]]] = {id(p): [] for p in params}
        self.is_coupled = are_coupled([root.grad_fn for root in begun.roots])
        self._backward()
        own = self.gradients
        self.direction = own if given is None else [g if d is None else d for g, d in zip(own, given, strict=True)]

    def _row_tensors(self) -> list[Tensor]:
        """Return tensors whose rows are samples, that all of the loss is made of."""
        roots = [call.predictions for call in self.begun.losses] or self.begun.roots
        fit = [t for t in roots if t.numel() > 1 and flat_rows(t, self.size) is not None and t.requires_grad]
        return fit if len(fit) == len(roots) else []

    def _backward(self) -> None:
        """Run backward, and keep what each use of a parameter is given."""
        uses = find_uses([root.grad_fn for root in self.begun.roots], self.params, self.size)
        by_node: dict[Any, list[Use]] = {}
        for use in uses:
            by_node.setdefault(use.node, []).append(use)
        with ExitStack() as stack:
            for node, at in by_node.items():
                stack.callback(node.register_prehook(partial(self._seen, at)).remove)
            found = torch.autograd.grad(
                self.begun.roots,
                [*self.rows, *self.params],
                grad_outputs=self.begun.grads,
                allow_unused=True,
                retain_graph=True,
            )
        num = len(self.rows)
        self.row_grads = [None if g is None else g.detach() for g in found[:num]]
        self.gradients = [_dense(g) for g in found[num:]]

    def _seen(self, uses: list[Use], grads: Sequence[Tensor | None]) -> None:
        for use in uses:
            maker = None
            try:
                with torch.no_grad():
                    maker = part_of(use, grads, self.size)
            except (AttributeError, RuntimeError, TypeError):
                maker = None  # another release of torch keeps something else
            self.makers[id(use.param)].append((use, maker))

    def result(self) -> PerSample:
        with torch.no_grad():
            measured = [self._measured(i) for i in range(len(self.params))]
        half = self._half() if self._can_be_masked and not self.is_coupled else None
        if half is not None:
            measured = [self._checked(i, m, half) for i, m in enumerate(measured)]
        squares = [0.0 if g is None else float(g.double().square().sum()) for g in self.gradients]
        total = sum(squares)
        if total == 0:
            raise ValueError("no gradient reaches a parameter")
        covered = [i for i, m in enumerate(measured) if m is not None]
        coverage = sum(squares[i] for i in covered) / total if np.isfinite(total) else 1.0
        if (coverage < _ENOUGH or not covered) and self._can_be_masked and np.isfinite(total):
            return self._halved(total)
        if not covered:
            raise ValueError("no operation of the model is one whose samples can be told apart")
        found = [m for m in measured if m is not None]
        return self._combined(found, covered, coverage, is_checked=half is not None)

    def _measured(self, i: int, choice: int = 0) -> Measured | None:
        gradient, direction, uses = self.gradients[i], self.direction[i], self.makers[id(self.params[i])]
        if gradient is None or direction is None or not uses or any(maker is None for _, maker in uses):
            return None
        parts = [maker(choice) for _, maker in uses if maker is not None]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return measure([use for use, _ in uses], known, direction, self.size)

    @property
    def _can_be_masked(self) -> bool:
        return bool(self.rows) and self.size > 1 and all(g is not None for g in self.row_grads)

    def _of_samples(self, chosen: NDArray[np.bool_]) -> list[Tensor | None]:
        """Return the gradients of some of the samples alone."""
        masked = []
        for gradient in self.row_grads:
            assert gradient is not None
            mask = torch.as_tensor(chosen, device=gradient.device)
            rows = gradient.reshape(self.size, -1)
            masked.append(torch.where(mask.unsqueeze(1), rows, torch.zeros_like(rows)).reshape(gradient.shape))
        found = torch.autograd.grad(self.rows, self.params, masked, allow_unused=True, retain_graph=True)
        return [_dense(g) for g in found]

    def _half(self) -> list[Tensor | None]:
        return self._of_samples(self._every_other)

    @property
    def _every_other(self) -> NDArray[np.bool_]:
        return np.arange(self.size) % 2 == 0

    def _checked(self, i: int, measured: Measured | None, half: Sequence[Tensor | None]) -> Measured | None:
        """Return what was measured of one parameter where the backward of half of the samples agrees; or the same with
        another dimension for the samples, where that agrees better; None where neither does."""
        if measured is None:
            return None
        off = self._discrepancy(i, measured, half[i])
        if off > _EXACT:
            other = self._measured(i, choice=1)
            off_other = np.inf if other is None else self._discrepancy(i, other, half[i])
            measured, off = (other, off_other) if other is not None and off_other < off else (measured, off)
        return measured if off <= _TOLERANCE else None

    def _discrepancy(self, i: int, measured: Measured, half: Tensor | None) -> float:
        direction = self.direction[i]
        assert direction is not None
        rows = torch.as_tensor(self._every_other, device=measured.dots.device)
        told = float(measured.dots[rows].double().sum())
        true = 0.0 if half is None else float((half.double() * direction.double()).sum())
        size = 0.0 if half is None else float(half.double().norm() * direction.double().norm())
        scale = max(size, float(measured.dots.double().abs().sum()))
        return abs(told - true) / scale if np.isfinite(told + true + scale) and scale else 0.0

    def _halved(self, total: float) -> PerSample:
        direction = self.direction

        def project(chosen: NDArray[np.bool_]) -> tuple[float, float]:
            found = self._of_samples(chosen)
            pairs = [(g, d) for g, d in zip(found, direction, strict=True) if g is not None and d is not None]
            dot = sum(float((g.double() * d.double()).sum()) for g, d in pairs)
            return dot, sum(float(g.double().square().sum()) for g, _ in pairs) ** 0.5

        whole = sum(
            float((g.double() * d.double()).sum())
            for g, d in zip(self.gradients, direction, strict=True)
            if g is not None and d is not None
        )
        dots, norms = halve(project, whole, self.size)
        length = _norm(direction)
        loss, losses = self._losses()
        return PerSample(
            share=dots / whole,
            norm=norms,
            cosine=dots / (norms * length),
            loss=loss,
            losses=losses,
            is_finite=np.ones(self.size, dtype=bool),
            projection=dots,
            method="halving",
            is_checked=True,
        )

    def _combined(
        self, found: Sequence[Measured], covered: Sequence[int], coverage: float, *, is_checked: bool
    ) -> PerSample:
        dots = _numbers(torch.stack([m.dots.double().cpu() for m in found]).sum(0))
        norms = np.sqrt(_numbers(torch.stack([m.squares.double().cpu() for m in found]).sum(0)))
        length = _norm([self.direction[i] for i in covered])
        loss, losses = self._losses()
        with np.errstate(all="ignore"):
            return PerSample(
                share=dots / dots.sum(),
                norm=norms,
                cosine=dots / (norms * length),
                loss=loss,
                losses=losses,
                is_finite=self._finite(found),
                projection=dots,
                positions=self._positions(found, dots.sum()),
                coverage=coverage,
                is_checked=is_checked,
            )

    def _finite(self, found: Sequence[Measured]) -> NDArray[np.bool_]:
        """Return which samples are finite where the fewest are not: backward through a normalisation, one that is not
        spreads to all others."""
        rows = [g.reshape(self.size, -1).isfinite().all(1) for g in self.row_grads if g is not None]
        flags = [_bools(row) for row in [*rows, *(m.squares.isfinite() for m in found)]]
        return min((f for f in flags if not f.all()), key=lambda f: int((~f).sum()), default=np.ones(self.size, bool))

    def _positions(self, found: Sequence[Measured], whole: float) -> NDArray[np.float64] | None:
        """Return the share of each place, over the parameters that are used place by place."""
        lengths = [m.places.size(1) for m in found if m.places is not None]
        if not lengths:
            return None
        common = max(set(lengths), key=lengths.count)
        same = [m.places for m in found if m.places is not None and m.places.size(1) == common]
        return _numbers(torch.stack([p.double().cpu() for p in same]).sum(0)) / whole

    def _losses(self) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        found = [call.by_place(self.size) for call in self.begun.losses]
        known = [pair for pair in found if pair is not None]
        if not known or len(known) < len(found):
            return np.full(self.size, np.nan), None
        with np.errstate(all="ignore"):
            by_sample = [np.where(counts, each, 0).sum(1) / counts.sum(1) for each, counts in known]
        alone = known[0] if len(known) == 1 else None
        places = None if alone is None or alone[0].shape[1] == 1 else np.where(alone[1], alone[0], np.nan)
        return np.sum(by_sample, axis=0), places


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    gradient = gradient.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors if t is not None) ** 0.5)


def _bools(tensor: Tensor) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = tensor.cpu().numpy()
    return found


def _numbers(tensor: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = tensor.numpy()
    return found
