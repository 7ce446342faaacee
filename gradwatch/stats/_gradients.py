"""The gradients of one optimizer step, as treatments see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..records import select_paths
from ._measure import GradientMeasures, GradientPieces, measure_gradients, measure_pieces
from ._norms import global_norm, tensor_norms
from ._scaling import scale_
from ._shards import index_on

__all__ = ["Gradients"]


class _Shared:
    """What a collection and its selections have in common: one measurement of all norms."""

    def __init__(self, paths: tuple[str, ...], params: tuple[nn.Parameter, ...], grad_scale: float | Tensor) -> None:
        self.paths = paths
        self.params = params
        self.grad_scale = grad_scale
        self.norms: Tensor | None = None
        self.dropped: set[int] = set()


class Gradients:
    """The gradients of one optimizer step, with norms that are measured once and shared by all who ask.

    Made by `Gradients.collect`. Positions run over the gradients still there: `paths`, `params`, `grads` and `norms`
    have equal lengths at any time, and lose an entry when a gradient is dropped.

    Attributes:
        grad_scale: what every `.grad` is still multiplied by (a loss scale), 1 if nothing. `norms` are free of it.
    """

    __slots__ = ("_members", "_shared")

    def __init__(self, shared: _Shared, members: tuple[int, ...]) -> None:
        self._shared = shared
        self._members = members

    @classmethod
    def collect(cls, named: Sequence[tuple[str, nn.Parameter]], *, grad_scale: float | Tensor = 1.0) -> Gradients:
        """Return the gradients of those parameters that have one; the same parameter under two names counts once.

        Args:
            named: paths and parameters.
            grad_scale: what every `.grad` is still multiplied by, a number or a 0-dim tensor on the device.

        Raises:
            ConfigError: `grad_scale` is a number that is not above 0.
        """
        if not isinstance(grad_scale, Tensor) and not grad_scale > 0:
            raise ConfigError(f"`grad_scale` must be above 0. Got {grad_scale}.")
        kept: dict[int, tuple[str, nn.Parameter]] = {}
        for path, param in named:
            if param.grad is not None:
                kept.setdefault(id(param), (path, param))
        paths, params = tuple([path for path, _ in kept.values()]), tuple([param for _, param in kept.values()])
        return cls(_Shared(paths, params, grad_scale), tuple(range(len(kept))))

    def _alive(self) -> list[int]:
        dropped = self._shared.dropped
        return [m for m in self._members if m not in dropped] if dropped else list(self._members)

    def __len__(self) -> int:
        return len(self._alive())

    @property
    def grad_scale(self) -> float | Tensor:
        return self._shared.grad_scale

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple([self._shared.paths[m] for m in self._alive()])

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        return tuple([self._shared.params[m] for m in self._alive()])

    @property
    def grads(self) -> list[Tensor]:
        """The live gradients: `p.grad` of each parameter, still multiplied by `grad_scale`."""
        params = self._shared.params
        return [params[m].grad for m in self._alive()]  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return self._shared.params[0].device if self._shared.params else torch.device("cpu")

    @property
    def norms(self) -> Tensor:
        """L2 norms free of `grad_scale`, whole ones for sharded parameters; float64, shape (n,), on the device.

        Measured when first asked for, for the whole collection at once, and kept up to date by `mul_`.
        """
        shared = self._shared
        if shared.norms is None:
            alive = [m for m in range(len(shared.params)) if m not in shared.dropped]
            found = tensor_norms([shared.params[m].grad for m in alive])  # type: ignore[misc]
            if isinstance(shared.grad_scale, Tensor) or shared.grad_scale != 1:
                found = found / shared.grad_scale
            shared.norms = found
            if len(alive) < len(shared.params):
                shared.norms = torch.zeros(len(shared.params), dtype=found.dtype, device=found.device)
                shared.norms.index_copy_(0, index_on(alive, found.device), found)
        mine = self._alive()
        if len(mine) == len(shared.params):
            return shared.norms
        return shared.norms.index_select(0, index_on(mine, shared.norms.device))

    @property
    def is_measured(self) -> bool:
        """Whether `norms` are known as they are now, so that asking for them costs nothing."""
        return self._shared.norms is not None

    @property
    def global_norm(self) -> Tensor:
        """The norm of all of them seen as one vector, free of `grad_scale`; 0-dim, float64."""
        return global_norm(self.norms)

    def measure(self, *, histograms: bool = False) -> GradientMeasures:
        """Return details, and histograms if asked for, with the norms from the same read, which `norms` gives from
        then on. Norms and maxima are free of `grad_scale`; histograms are of `.grad` as it is."""
        return self._take(measure_gradients(self.grads, histograms=histograms))

    def pieces(self, *, histograms: bool = False) -> GradientPieces:
        """Return what can be measured on this rank alone: norms, and with `histograms` all of `measure`. Once its rows
        and maxima are merged over ranks, give it to `put_together`."""
        return measure_pieces(self.grads, histograms=histograms)

    def put_together(self, pieces: GradientPieces) -> GradientMeasures:
        """Return the measures of merged pieces, whose norms `norms` gives from then on."""
        return self._take(pieces.whole())

    def _take(self, found: GradientMeasures) -> GradientMeasures:
        scale = self._shared.grad_scale
        if isinstance(scale, Tensor) or scale != 1:
            found = replace(found, norms=found.norms / scale, maxima=found.maxima / scale)
        if len(self) == len(self._shared.params):
            self._shared.norms = found.norms
        return found

    def select(self, patterns: str | Sequence[str]) -> Gradients:
        """Return those whose path matches any of the globs, as a view: what changes through it shows in this
        collection's norms. It may be empty: a parameter that exists need not have a gradient at this step."""
        alive = self._alive()
        chosen = select_paths([self._shared.paths[m] for m in alive], patterns)
        return Gradients(self._shared, tuple([m for m, is_chosen in zip(alive, chosen, strict=True) if is_chosen]))

    def mul_(self, coefficient: float | Tensor) -> Gradients:
        """Multiply the gradients, and their norms with them; returns self.

        On the CPU gradients whose coefficient is exactly 1 are left untouched, at no cost. Multiplying by 0 does not
        remove nan or inf (0 * nan is nan): `drop_` does.

        Args:
            coefficient: a number or a 0-dim tensor for all, or a tensor of shape (n,), one for each.

        Raises:
            ValueError: a tensor of another shape.
        """
        mine = self._alive()
        if isinstance(coefficient, Tensor) and coefficient.shape not in ((), (len(mine),)):
            raise ValueError(
                f"`mul_` takes one coefficient, or {len(mine)}: one for each gradient. "
                f"Got a tensor of shape {tuple(coefficient.shape)}."
            )
        known = self._shared.norms is not None
        norms = self.norms if known else None
        scale_(self.grads, coefficient)
        if norms is None:
            return self
        factor = coefficient.to(norms).abs() if isinstance(coefficient, Tensor) else abs(coefficient)
        scaled = norms * factor
        if len(mine) == len(self._shared.params):
            self._shared.norms = scaled
        else:
            assert self._shared.norms is not None
            self._shared.norms = self._shared.norms.index_copy(0, index_on(mine, scaled.device), scaled)
        return self

    def touch(self) -> None:
        """Say that gradients were changed by other means: norms are measured again when next asked for."""
        self._shared.norms = None

    def replace_(self, position: int, tensor: Tensor) -> None:
        """Put another tensor in the place of one gradient.

        Raises:
            ValueError: its shape is not that of the parameter.
        """
        member = self._alive()[position]
        param = self._shared.params[member]
        if tensor.shape != param.shape:
            raise ValueError(
                f"a gradient of {self._shared.paths[member]!r} has shape {tuple(param.shape)}. "
                f"Got {tuple(tensor.shape)}."
            )
        param.grad = tensor
        self.touch()

    def drop_(self, positions: Sequence[int]) -> None:
        """Set `.grad` of these parameters to None, so that the optimizer leaves them alone; positions move up."""
        alive = self._alive()
        for member in [alive[p] for p in positions]:
            self._shared.params[member].grad = None
            self._shared.dropped.add(member)
