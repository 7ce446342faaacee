"""The gradients of one optimizer step, as treatments see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ConfigError
from ..records import select_paths
from ..torchside import Lent, home, identity, moved, owned, why_unreadable
from ._measure import GradientMeasures, GradientPieces, measure_gradients, measure_pieces
from ._norms import Row, global_norm, host_norms, tensor_norms
from ._scaling import scale_
from ._shards import index_on

__all__ = ["Gradients"]

_DTYPE = attrgetter("dtype")
_WIDE = frozenset({torch.float64, torch.complex128})
_NOTHING: Mapping[str, str] = MappingProxyType({})


class _Shared:
    """What a collection and its selections have in common: one measurement of all norms."""

    def __init__(self, paths: tuple[str, ...], params: tuple[nn.Parameter, ...], grad_scale: float | Tensor) -> None:
        self.paths = paths
        self.params = params
        self.grad_scale = grad_scale
        self._norms: Tensor | None = None
        # As a kernel gave them, until somebody wants them in one tensor.
        self._row: Row | None = None
        # As the host found them, and their norm, until somebody wants tensors.
        self._found: tuple[NDArray[np.float64], float] | None = None
        self.dropped: set[int] = set()
        self.is_owned = False
        self._whole: tuple[Tensor, int, Tensor, int] | None = None

    @property
    def norms(self) -> Tensor | None:
        """Free of `grad_scale`; None where nobody has measured them, or since they have changed."""
        if self._found is not None:
            norms, whole = self._found
            # A copy: treatments may go on to change norms in place.
            self.norms = found = torch.from_numpy(norms.copy())
            total = torch.tensor(whole, dtype=torch.float64, device="cpu")
            self._whole = (found, _version(found), total, _version(total))
        if self._row is not None:
            self._norms, self._row = self._row.tensor, None
        return self._norms

    @norms.setter
    def norms(self, norms: Tensor | None) -> None:
        self._norms, self._found, self._row = norms, None, None

    @property
    def is_measured(self) -> bool:
        return self._norms is not None or self._found is not None or self._row is not None

    def found_by_host(self, norms: NDArray[np.float64], whole: float) -> None:
        """Take the norms of all, and the norm of these."""
        self._norms, self._found, self._row = None, (norms, whole), None

    def found_apart(self, row: Row) -> None:
        """Take the norms of all, unread."""
        self._norms, self._found, self._row = None, None, row

    @property
    def unread(self) -> Tensor | Sequence[Tensor] | None:
        """What `norms` gives, one by one where nobody has wanted them in one tensor."""
        return self.norms if self._row is None else self._row.unread

    def own(self) -> None:
        """Make sure that arithmetic in place on one gradient changes each of its elements once, and no other gradient.

        An expanded gradient, one that is another parameter's too, and one that may not be written to give way to a
        copy, as the optimizer will find it.
        """
        if self.is_owned:
            return
        self.is_owned = True
        places: set[int] = set()
        for member, param in enumerate(self.params):
            if member in self.dropped or param.grad is None:
                continue
            grad = owned(param.grad)
            place = identity(grad)
            if place and place in places:
                grad = grad.detach().clone()
            places.add(place)
            if grad is not param.grad:
                param.grad = grad

    def global_norm(self, norms: Tensor) -> Tensor:
        """Return the norm of all, from their norms; kept until these are others."""
        kept = self._whole
        if kept is None or kept[0] is not norms or kept[1] != _version(norms) or kept[3] != _version(kept[2]):
            # Squares of norms of float32 tensors do not leave float64.
            # Gradients are of their parameters' types.
            whole = global_norm(norms, in_range=_WIDE.isdisjoint(map(_DTYPE, self.params)))
            kept = self._whole = (norms, _version(norms), whole, _version(whole))
        return kept[2]

    def unscaled(self, values: Tensor) -> Tensor:
        """Return values free of `grad_scale`."""
        scale = self.grad_scale
        if isinstance(scale, Tensor):
            return values / moved(scale, values.device)
        return values if scale == 1 else values / scale


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Gradients:
    """The gradients of one optimizer step, with norms that are measured once and shared by all who ask.

    Made by `Gradients.collect`. Positions run over the gradients still there: `paths`, `params`, `grads` and `norms`
    have equal lengths at any time, and lose an entry when a gradient is dropped.

    Attributes:
        grad_scale: what every `.grad` is still multiplied by (a loss scale), 1 if nothing. `norms` are free of it.
        unread: path -> why its gradient can't be read, and is not among these.
    """

    __slots__ = ("_members", "_shared", "unread")
    unread: Mapping[str, str]

    def __init__(self, shared: _Shared, members: Sequence[int]) -> None:
        self._shared = shared
        self._members = members
        self.unread = _NOTHING

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
        unread: dict[str, str] = {}
        for path, param in named:
            if param.grad is None:
                continue
            if why := why_unreadable(param.grad):
                unread[path] = why
            else:
                kept.setdefault(id(param), (path, param))
        paths, params = tuple([path for path, _ in kept.values()]), tuple([param for _, param in kept.values()])
        found = cls(_Shared(paths, params, grad_scale), tuple(range(len(kept))))
        found.unread = unread
        return found

    @classmethod
    def of(
        cls, paths: tuple[str, ...], params: tuple[nn.Parameter, ...], *, grad_scale: float | Tensor = 1.0
    ) -> Gradients:
        """Return what `collect` does, of parameters that are known to differ and to have a gradient each."""
        return cls(_Shared(paths, params, grad_scale), range(len(params)))

    def _alive(self) -> list[int]:
        dropped = self._shared.dropped
        return [m for m in self._members if m not in dropped] if dropped else list(self._members)

    def __len__(self) -> int:
        return len(self._alive()) if self._shared.dropped else len(self._members)

    @property
    def grad_scale(self) -> float | Tensor:
        return self._shared.grad_scale

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple([self._shared.paths[m] for m in self._alive()])

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        if not self._shared.dropped and len(self._members) == len(self._shared.params):
            return self._shared.params
        return tuple([self._shared.params[m] for m in self._alive()])

    @property
    def grads(self) -> list[Tensor]:
        """The live gradients: `p.grad` of each parameter, still multiplied by `grad_scale`, to be changed in place.

        One that can't be (an expanded tensor, one that two parameters share) becomes a copy first; `tensors` are to be
        read only, and stay as they are.
        """
        self._shared.own()
        return self.tensors

    @property
    def tensors(self) -> list[Tensor]:
        """The live gradients as they are, still multiplied by `grad_scale`: to be read only."""
        params = self._shared.params
        if not self._shared.dropped and len(self._members) == len(params):
            return [p.grad for p in params]  # type: ignore[misc]
        return [params[m].grad for m in self._alive()]  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where numbers about them are put together (see `home`)."""
        return home(self._shared.params)

    @property
    def norms(self) -> Tensor:
        """L2 norms free of `grad_scale`, whole ones for sharded parameters; float64, shape (n,), on the device.

        Measured when first asked for, for the whole collection at once, and kept up to date by `mul_`.
        """
        shared = self._shared
        if shared.norms is not None and not shared.dropped and len(self._members) == len(shared.params):
            return shared.norms
        if shared.norms is None:
            alive = [m for m in range(len(shared.params)) if m not in shared.dropped]
            params = [shared.params[m] for m in alive]
            found = tensor_norms([p.grad for p in params], of=params)  # type: ignore[misc]
            shared.norms = found = shared.unscaled(found)
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
        return self._shared.is_measured

    @property
    def global_norm(self) -> Tensor:
        """The norm of all of them seen as one vector, free of `grad_scale`; 0-dim, float64."""
        return self._shared.global_norm(self.norms)

    def measure_on_host(
        self,
        known: tuple[NDArray[np.float64], float] | None = None,
        tensors: list[Tensor] | None = None,
        lent: Lent | None = None,
    ) -> tuple[NDArray[np.float64], float, list[Tensor]] | None:
        """Return norms and the norm of all as numbers, and what was measured; `norms` gives them from then on.

        None where it takes more than one call of a compiled kernel: where gradients are elsewhere, in pieces, of
        several dtypes or odd layouts.

        Args:
            known: both, as they are in `.grad`, where somebody has measured them so.
            tensors: what `tensors` gives, where somebody has just asked.
            lent: what `lend_at_once` gives for these, likewise.
        """
        shared, scale = self._shared, self._shared.grad_scale
        if (
            shared.dropped
            or len(self._members) < len(shared.params)
            or (isinstance(scale, Tensor) and not scale.is_cpu)
        ):
            return None
        if tensors is None:
            tensors = self.tensors
        found = host_norms(tensors, lent) if known is None else known
        if found is None:
            return None
        norms, whole = found
        if isinstance(scale, Tensor) or scale != 1:
            norms, whole = norms / float(scale), whole / float(scale)
        shared.found_by_host(norms, whole)
        return norms, whole, tensors

    def measure(self, *, histograms: bool = False) -> GradientMeasures:
        """Return details, and histograms if asked for, with the norms from the same read, which `norms` gives from
        then on. Norms and maxima are free of `grad_scale`; histograms are of `.grad` as it is."""
        return self._take(measure_gradients(self.tensors, histograms=histograms, of=self.params))

    @property
    def unread_norms(self) -> Tensor | Sequence[Tensor]:
        """For a `Transfer`: `norms`, or the same one by one where they have not been put in one tensor yet."""
        shared = self._shared
        if shared.dropped or len(self._members) < len(shared.params) or (found := shared.unread) is None:
            return self.norms
        return found

    def pieces(self, *, histograms: bool = False, known: Row | None = None) -> GradientPieces:
        """Return what can be measured on this rank alone: norms, and with `histograms` all of `measure`. Once its rows
        and maxima are merged over ranks, give it to `put_together`.

        Args:
            histograms: with details and histograms.
            known: the norms as they are in `.grad`, where somebody has measured them.
        """
        scale = self._shared.grad_scale
        apart = not isinstance(scale, Tensor) and scale == 1
        return measure_pieces(self.tensors, histograms=histograms, of=self.params, apart=apart, known=known)

    def put_together(self, pieces: GradientPieces) -> GradientMeasures:
        """Return the measures of merged pieces, whose norms `norms` gives from then on."""
        return self._take(pieces.whole())

    def _take(self, found: GradientMeasures) -> GradientMeasures:
        scale, unscaled = self._shared.grad_scale, self._shared.unscaled
        if isinstance(scale, Tensor) or scale != 1:
            found = replace(found, row=Row(unscaled(found.norms)), maxima=unscaled(found.maxima))
        if len(self) == len(self._shared.params):
            self._shared.found_apart(found.row)
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
        known = self._shared.is_measured
        norms = self.norms if known else None
        scale_(self.grads, coefficient)
        if norms is None:
            return self
        factor = (
            moved(coefficient, norms.device, norms.dtype).abs() if isinstance(coefficient, Tensor) else abs(coefficient)
        )
        scaled = norms * factor
        if len(mine) == len(self._shared.params):
            self._shared.norms = scaled
        else:
            assert self._shared.norms is not None
            self._shared.norms = self._shared.norms.index_copy(0, index_on(mine, scaled.device), scaled)
        return self

    def touch(self) -> None:
        """Say that gradients were changed by other means: norms are measured again when next asked for.

        Within a step nobody needs to: after a treatment that is not gradwatch's own, all is looked at anew. A gradient
        that is gone since counts as dropped.
        """
        shared = self._shared
        gone = [m for m in self._alive() if shared.params[m].grad is None]
        shared.dropped.update(gone)
        shared.norms, shared.is_owned = None, False

    def lack_(self, absent: Sequence[int]) -> None:
        """Say that some of them are on no rank, which was not known before ranks had met; positions move up."""
        alive = self._alive()
        self._shared.dropped.update(alive[p] for p in absent)

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
        self._shared.is_owned = False
        self.touch()

    def drop_(self, positions: Sequence[int]) -> None:
        """Set `.grad` of these parameters to None, so that the optimizer leaves them alone; positions move up."""
        alive = self._alive()
        for member in [alive[p] for p in positions]:
            self._shared.params[member].grad = None
            self._shared.dropped.add(member)
