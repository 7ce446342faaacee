"""Takes one step's measurements: which, where from, and as which columns they come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..hooks import ModuleTap, TapStats
from ..records import Floats
from ..stats import Gradients, UpdateMeter, row_spread, second_look
from ._local_norms import LocalNorms
from ._options import MeasureOptions, is_due
from ._paths import Watched, clean_path, signature, watched

__all__ = ["Meter", "constant", "detach_scalar"]


class Meter:
    """Measures one model for one engine. Holds the hooks and the parameter copies; `close()` gives both back."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], options: MeasureOptions) -> None:
        self.model = model
        self.options = options
        self._optimizers = tuple(optimizers)
        self.watched: Watched = watched(model, optimizers, tuple(options.paths))
        self._real_paths = {clean_path(p): p for p, _ in model.named_modules() if p}
        self.tap: ModuleTap | None = self._make_tap()
        self._updates: UpdateMeter | None = None
        self._updates_step = -1
        self._update_positions = np.zeros(0, np.int64)
        self._probe_handles: list[Any] = []
        self._ordered = False
        self.alert_until = -1
        self._marks: dict[int, tuple[int, int] | None] = {}
        self.is_muted: Callable[[], bool] = lambda: False
        self.local = LocalNorms() if options.local_norms else None
        self._attach_local()

    def _attach_local(self) -> None:
        if self.local is not None:
            self.local.attach(p for _, _, p in self.watched.params)

    def _make_tap(self) -> ModuleTap | None:
        if not self.watched.modules or self.options.activations_every is None:
            return None
        paths = [self._real_paths[p] for p in self.watched.modules]
        return ModuleTap(self.model, paths, backend=self.options.backward, gate=self._listens)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU where there are none."""
        p = next((p for _, _, p in self.watched.params), None)
        return torch.device("cpu") if p is None else p.device

    def refresh(self) -> bool:
        """Look whether parameters were added, replaced, frozen or unfrozen; True if the index is a new one."""
        if signature(self.model, self._optimizers) == self.watched.signature:
            return False
        old = self.watched.index
        self.watched = watched(self.model, self._optimizers, tuple(self.options.paths))
        self._real_paths = {clean_path(p): p for p, _ in self.model.named_modules() if p}
        if self.tap is not None and self.watched.index.paths != old.paths:
            self.tap.close()
            self.tap = self._make_tap()
        self._attach_local()
        self._updates = None
        self._ordered = False
        return True

    def samples(self, step: int) -> bool:
        """Whether modules are sampled at this step."""
        if self.options.activations_every is None:
            return False
        return step <= self.alert_until or is_due(step, self.options.activations_every)

    def note_gradients(self, grads: Gradients) -> None:
        """Remember a few gradients as the optimizer will find them."""
        self._marks = {id(p): _mark(p) for p in grads.params[:3]}

    def were_kept(self, grads: Gradients, num_parts: int) -> float | None:
        """Return 1 if gradients were demonstrably not reset since the last step, 0 if they were, None if unknown.

        A gradient that is the same memory, written to just once per micro-batch since, was only added to: `zero_grad`
        would have given new memory or written once more.
        """
        found = [(self._marks[id(p)], _mark(p)) for p in grads.params[:3] if id(p) in self._marks]
        if not found or any(old is None or new is None for old, new in found):
            return None
        return float(all(new == (old[0], old[1] + num_parts) for old, new in found if old is not None))

    def arm(self) -> None:
        """Begin to listen to forward and backward passes."""
        if self.tap is not None and not self.tap.armed:
            self.tap.arm()
            self._arm_probe()

    def disarm(self) -> None:
        if self.tap is not None and self.tap.armed:
            self.tap.disarm()
        for handle in self._probe_handles:
            handle.remove()
        self._probe_handles = []

    @property
    def armed(self) -> bool:
        return self.tap is not None and self.tap.armed

    def take_modules(self) -> TapStats | None:
        """Return what the modules gave since `arm`, and stop listening."""
        stats = None if self.tap is None else self.tap.take()
        self.disarm()
        if not self._ordered and self.tap is not None and self.tap.forward_order:
            self.watched.reordered(self.tap.forward_order)
            self._ordered = True
        return stats

    def blank_modules(self) -> TapStats | None:
        """Return what `take_modules` would, had nothing been seen; None where no module is watched."""
        return None if self.tap is None else TapStats.blank(self.tap.paths, self.device)

    def module_positions(self) -> NDArray[np.int64]:
        """Return the modules' places in the index, in the tap's order."""
        places = self.watched.index.positions
        return np.asarray([places[p] for p in self.watched.modules], np.int64)

    def _listens(self) -> bool:
        # Validation runs between training steps; per-task gradients are probed inside them (S6).
        return self.model.training and not self.is_muted()

    def take_output(self) -> Tensor | None:
        """Return the last output that a module gave, as a stand-in for the model's, and let go of it."""
        if self.tap is None:
            return None
        output, self.tap.last_output = self.tap.last_output, None
        return output

    def _arm_probe(self) -> None:
        # The last module to finish gives the model's output; which one that is, only the pass itself tells. So those
        # that are not watched are asked too.
        tap = self.tap
        assert tap is not None

        def remember(module: nn.Module, args: Any, output: Any) -> None:
            if self._listens() and isinstance(output, Tensor) and output.ndim >= 2 and output.is_floating_point():
                tap.last_output = output.detach()

        for path, module in self.model.named_modules():
            if path and not tap.listens_to(module):
                self._probe_handles.append(module.register_forward_hook(remember))

    def gradients(self, optimizers: Sequence[Optimizer], grad_scale: float | Tensor) -> Gradients:
        """Return the gradients of the watched parameters that these optimizers hold."""
        named = [(path, p) for _, path, p in self.watched.params]
        if len(optimizers) != len(self._optimizers):
            held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
            named = [(path, p) for path, p in named if id(p) in held]
        return Gradients.collect(named, grad_scale=grad_scale)

    def positions(self, params: Sequence[Tensor]) -> NDArray[np.int64]:
        """Return the parameters' places in the index."""
        by_id = self.watched.by_id
        return np.fromiter((by_id[id(p)] for p in params), np.int64, len(params))

    def look_again(self, grads: Gradients, norms: Floats) -> Floats:
        """Return norms with a rescaled second look at those that float32 squares can't be trusted with (N6)."""
        doubtful = np.flatnonzero((norms == 0) | np.isinf(norms) | (norms < 1e-15))
        if not len(doubtful):
            return norms
        tensors = grads.grads
        again = second_look([tensors[i] for i in doubtful]).cpu().numpy() / abs(grads.grad_scale)
        norms = norms.copy()
        norms[doubtful] = again
        return norms

    def details(self, grads: Gradients) -> dict[str, Tensor]:
        """Return absmax, zeros, non-finite counts and exponent histograms of the gradients, on the device.

        The norms come from the same read, so this is to be asked before them.
        """
        found = grads.measure(histograms=True)
        assert found.histograms is not None
        return {"details_sums": found.sums, "details_maxima": found.maxima, "histograms": found.histograms}

    def spreads(self, grads: Gradients) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
        """Return the row spread of every weight of two or more dimensions, for the first step."""
        chosen = [p for p in grads.params if p.ndim >= 2 and p.shape[0] > 1]
        if not chosen:
            return np.zeros(0, np.int64), {}
        return self.positions(chosen), {"row_spread": row_spread([p.detach() for p in chosen])}

    def before_update(self, step: int, grads: Gradients, *, moves: bool = True) -> None:
        """Keep copies of parameters where this step's update ratio is due.

        Args:
            moves: whether this rank steps and can measure. If not, it takes part all the same where parameters are in
                pieces: the other ranks may step.
        """
        if not is_due(step, self.options.updates_every) or not len(grads):
            return
        if self._updates is None or len(self._update_positions) != len(grads):
            self._updates = UpdateMeter(list(grads.params), self.options.memory_limit_bytes // 2)
            self._update_positions = self.positions(grads.params)
        if moves or self._updates.in_pieces:
            self._updates_step = step
            self._updates.before(blank=not moves)

    def after_update(self) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
        """Return which parameters' updates were measured, and the norms of updates and parameters."""
        if self._updates is None or self._updates_step < 0:
            return np.zeros(0, np.int64), {}
        self._updates_step = -1
        stats = self._updates.after()
        positions = self._update_positions[np.asarray(stats.positions, np.int64)]
        return positions, {"update_norm": stats.update_norms, "param_norm": stats.param_norms}

    def drop_update(self) -> None:
        """Forget the copies: the step did not happen."""
        if self._updates is not None and self._updates_step >= 0:
            self._updates.discard()
        self._updates_step = -1

    @property
    def too_large(self) -> list[str]:
        """Parameters whose update can't be measured within the memory limit."""
        if self._updates is None:
            return []
        paths = self.watched.index.paths
        return [paths[self._update_positions[i]] for i in self._updates.left_out]

    def close(self) -> None:
        self.disarm()
        if self.tap is not None:
            self.tap.close()
        if self.local is not None:
            self.local.close()
        self._updates = None


def detach_scalar(value: Any, device: torch.device) -> Tensor:
    """Return a loss given as a tensor or a number as a 0-dim float64 tensor."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).mean()
    return constant(value, device)


def constant(value: float, device: torch.device) -> Tensor:
    """Return a number as a 0-dim float64 tensor; `torch.tensor` would wait for the device."""
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _mark(p: Tensor) -> tuple[int, int] | None:
    grad = p.grad
    # Exactly torch.Tensor: sharded and sparse ones have no memory of their own to compare.
    if type(grad) is not Tensor or grad.layout is not torch.strided or grad.is_inference():
        return None
    return grad.data_ptr(), grad._version
