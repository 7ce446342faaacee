"""Names, order and owners of what is watched: the `Index`, and the parameters that it speaks of."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ..errors import ConfigError, UnknownPathError
from ..records import MODULE, PARAMETER, Index, select_paths
from ..torchside import (
    Lender,
    Pipeline,
    StandIn,
    ZeroPart,
    clean_path,
    engine_of,
    is_flat_sharded,
    is_split_by_zero,
    masters,
    member,
    parameters_of,
    real_of,
    shape_of,
    whole_of,
)
from ._stages import Found, Row, Stages, on_all_stages

__all__ = ["Watched", "unwrap", "watched"]

_AND_MORE = " and others of its flat parameter"
_MAX_KEPT = 8
"""Indices kept of one that differ in what is frozen: optimizers that take turns freeze each other's parameters."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside DDP, DataParallel, DeepSpeed, torch.compile and Fabric wrappers."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)) or engine_of(model) is model:
            model = model.module
            continue
        # torch.compile's; Fabric's, which holds the model as it was handed over beside the one it runs.
        inner = member(model, "_orig_mod")
        runs = None if isinstance(inner, nn.Module) else member(model, "_forward_module")
        if runs is not None:
            inner = runs if is_flat_sharded(runs) else member(model, "_original_module")
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(eq=False)
class Watched:
    """What a run watches: the index, and the live parameters behind it.

    Attributes:
        index: parameters first (in `named_parameters()` order), then modules.
        by_id: id of a parameter -> its position in the index.
        params: the parameters that are in an optimizer, with their positions: `(position, path, parameter)`.
        modules: module paths, in index order.
        unheld: the model's parameters that no optimizer holds, likewise.
        hooked: the modules, in index order: replaced ones are others though paths and parameters stay.
        replaced: path -> parameter that an optimizer still holds, and the model no more: it counts for nothing.
        strange: path -> why nothing can be said of a parameter: its gradient is a piece of something unknown. Where
            there is any, no treatment acts, since it would act on a part.
        stages: what is known of a pipeline's parameters; None where the model is none.
    """

    index: Index
    by_id: dict[int, int]
    params: list[tuple[int, str, nn.Parameter]]
    modules: tuple[str, ...]
    unheld: list[tuple[int, str, nn.Parameter]] = field(default_factory=list)
    hooked: tuple[nn.Module, ...] = ()
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)
    strange: dict[str, str] = field(default_factory=dict)
    stages: Stages | None = None
    _by_flags: dict[bytes, Index] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """Trainable parameters of the model that no optimizer holds."""
        return tuple(path for _, path, p in self.unheld if p.requires_grad)

    def retrained(self) -> Index:
        """Return the index with `trainable` as it is now; the same one whenever the same are frozen."""
        trainable = self.index.trainable.copy()
        for i, _, p in (*self.params, *self.unheld):
            trainable[i] = p.requires_grad
        self._by_flags.setdefault(self.index.trainable.tobytes(), self.index)
        key = trainable.tobytes()
        if key not in self._by_flags:
            if len(self._by_flags) >= _MAX_KEPT:
                self._by_flags.clear()
            self._by_flags[key] = replace(self.index, trainable=trainable)
        self.index = self._by_flags[key]
        return self.index

    @cached_property
    def held(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are in an optimizer, once each."""
        return tuple([p for _, _, p in self.params])

    @cached_property
    def stand_ins(self) -> tuple[nn.Parameter, ...]:
        """Those that stand in for parts of what the optimizer holds."""
        return tuple([p for p in self.held if real_of(p) is not p])

    def held_by(self, optimizers: Sequence[Optimizer]) -> set[int]:
        """Return the ids of what these hold: of a parameter that something stands in for, of that."""
        ids = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        if self.stages is not None:
            ids |= self.stages.held_by(optimizers)
        return ids.union(id(p) for p in self.stand_ins if _is_stepped(p, ids))

    @cached_property
    def is_in_pieces(self) -> bool:
        """Whether any of them lies in pieces on several ranks, which nobody can measure or treat alone."""
        dtensor = sys.modules.get("torch.distributed.tensor")
        return any(
            whole_of(p) is not None or (dtensor is not None and isinstance(p, dtensor.DTensor)) for p in self.held
        )

    @cached_property
    def zero(self) -> ZeroPart | None:
        """A parameter that DeepSpeed's ZeRO steps, for all of them; None where it steps none."""
        return next((p for p in self.held if isinstance(p, ZeroPart)), None)

    @property
    def zero_masters(self) -> Sequence[Tensor]:
        """The flat tensors that DeepSpeed's ZeRO steps one by one; nothing where it steps none."""
        return () if self.zero is None else self.zero.masters

    def settle(self) -> None:
        """Let what stands in for parameters lie where they lie now."""
        for p in self.stand_ins:
            p.settle()  # type: ignore[attr-defined]

    @cached_property
    def names(self) -> dict[int, str]:
        """Id of what an optimizer holds -> its path; of a flat parameter that of the first one in it."""
        found: dict[int, str] = {}
        for _, path, p in self.params:
            if (held := id(real_of(p))) in found and not found[held].endswith(_AND_MORE):
                found[held] += _AND_MORE
            found.setdefault(held, path)
        return found

    @cached_property
    def known(self) -> tuple[nn.Parameter, ...]:
        """All parameters, those that no optimizer holds among them."""
        return (*self.held, *[p for _, _, p in self.unheld])

    @cached_property
    def held_paths(self) -> tuple[str, ...]:
        return tuple([path for _, path, _ in self.params])

    @cached_property
    def held_positions(self) -> NDArray[np.int64]:
        return np.asarray([position for position, _, _ in self.params], np.int64)

    @cached_property
    def lender(self) -> Lender:
        """Lends the gradients of `held`."""
        return Lender(array("q", map(Tensor.numel, self.held)))

    def reordered(self, forward_order: Sequence[str]) -> Index:
        """Return the index with `depth` taken from the order in which modules were first called."""
        if self.stages is not None:
            return self.index  # stages follow one another, and no rank sees the order in those of others
        place = {clean_path(p): i for i, p in enumerate(forward_order)}
        last = len(place)
        owners = [
            p if k == MODULE else p.rpartition(".")[0] for p, k in zip(self.index.paths, self.index.kinds, strict=True)
        ]
        keys = [(_place(owner, place, last), i) for i, owner in enumerate(owners)]
        # A container is called before its children, but its output comes after theirs: called order serves both.
        depth = np.empty(len(keys), np.int64)
        depth[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
        self.index = replace(self.index, depth=depth)
        self._by_flags.clear()
        return self.index


def _place(owner: str, place: dict[str, int], last: int) -> int:
    """Return the place of a module, or of the nearest one around it that was called: a part may be used without a call
    (the projection inside `MultiheadAttention`, H19)."""
    while owner:
        if owner in place:
            return place[owner]
        owner = owner.rpartition(".")[0]
    return last


def _is_stepped(p: nn.Parameter, held: Container[int]) -> bool:
    """Return whether an optimizer that holds tensors of these ids steps a parameter, or what stands in for it."""
    return (isinstance(p, StandIn) and p.is_in_optimizer) or id(real_of(p)) in held


def watched(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    patterns: Sequence[str] = ("*",),
    *,
    known: Mapping[int, str] | None = None,
    strict: bool = True,
    why_apart: str = "",
) -> Watched:
    """Return what to watch of a model.

    Args:
        model: unwrapped.
        optimizers: raw ones.
        patterns: of the paths to watch.
        known: id -> path of living parameters that were the model's before.
        strict: whether a pattern must match. In mid run what it matched may have gone.
        why_apart: why nothing can be said of any parameter; "" where that is not so.

    Raises:
        UnknownPathError: a pattern matches no parameter and no module, and `strict`.
        ConfigError: there is no optimizer.
    """
    if not optimizers:
        raise ConfigError("gradwatch needs at least one optimizer. Got none.")
    held = {id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}
    found, gone = _found(model, held, known or {})
    modules = {clean_path(path): m for path, m in model.named_modules() if path and clean_path(path)}
    if why_apart:
        modules = {}
        found.taken.clear()
        found.strange.update((path, why_apart) for path, _ in found.params)
    found.modules.extend(Row(path, MODULE, 0, (), type(m).__name__, False, False) for path, m in modules.items())
    stages = None
    if isinstance(model, Pipeline):
        found, stages = on_all_stages(model, found, optimizers)
    rows, params, _, taken, strange, module_rows = found
    if strict:
        _check(model, [r.path for r in (*rows, *module_rows)], patterns)
    mask = select_paths([r.path for r in (*rows, *module_rows)], list(patterns))
    chosen_params = [q for q, keep in zip(params, mask[: len(rows)], strict=True) if keep]
    chosen_rows = [r for r, keep in zip((*rows, *module_rows), mask, strict=True) if keep]
    placed = [(i, path, p) for i, (path, p) in enumerate(chosen_params)]
    chosen_modules = tuple(r.path for r in chosen_rows if r.kind == MODULE)
    return Watched(
        index=_index_of(chosen_rows),
        by_id=_by_id(placed, stages),
        params=[row for row in placed if id(row[2]) in taken],
        modules=chosen_modules,
        unheld=[row for row in placed if id(row[2]) not in taken and row[1] not in strange],
        hooked=tuple(modules[path] for path in chosen_modules if path in modules),
        replaced={path: held[key] for key, path in gone.items() if select_paths([path], list(patterns)).any()},
        strange={path: strange[path] for _, path, _ in placed if path in strange},
        stages=stages,
    )


def _index_of(rows: Sequence[Row]) -> Index:
    return Index(
        paths=tuple(r.path for r in rows),
        kinds=tuple(r.kind for r in rows),
        numel=np.asarray([r.numel for r in rows], np.int64),
        shapes=tuple(r.shape for r in rows),
        depth=np.arange(len(rows), dtype=np.int64),
        types=tuple(r.owner for r in rows),
        in_optimizer=np.asarray([r.held for r in rows], np.bool_),
        trainable=np.asarray([r.trainable for r in rows], np.bool_),
    )


def _found(
    model: nn.Module, held: Mapping[int, nn.Parameter], known: Mapping[int, str]
) -> tuple[Found, dict[int, str]]:
    """Return what is on this rank, and which of the model's former parameters an optimizer still holds: id -> path."""
    found = Found([], [], [], set(), {}, [])
    rows, params, owners, taken, strange, _ = found
    seen: set[int] = set()
    for path, owner, p, why in parameters_of(model):
        seen.add(id(real_of(p)))
        params.append((path, p))
        owners.append(id(owner))
        if why:
            strange[path] = why
        elif _is_stepped(p, held):
            taken.add(id(p))
        rows.append(_row(path, p, type(owner).__name__, bool(why) or id(p) in taken))
    gone = {key: path for key, path in known.items() if key in held and key not in seen}
    foreign = [q for key, q in held.items() if key not in seen and key not in gone]
    if any(isinstance(p, ZeroPart) or is_split_by_zero(p) for _, p in params):
        foreign = []  # what they are split into
    foreign = _without_masters(foreign, params, rows, taken, strange)
    for i, p in enumerate(foreign):
        # Held by an optimizer but never by the model: another model's parameters, or a copy of this one's.
        path = f"<optimizer>.{i}" if not isinstance(model, Pipeline) else f"<optimizer of {model.name}>.{i}"
        params.append((path, p))
        owners.append(0)
        taken.add(id(p))
        rows.append(_row(path, p, "", True))
    return found, gone


def _by_id(placed: Sequence[tuple[int, str, nn.Parameter]], stages: Stages | None) -> dict[int, int]:
    found = {id(p): i for i, _, p in placed}
    if stages is not None:
        found |= {id(stages.blanks[id(p)]): i for i, _, p in placed}
    return found


def _without_masters(
    foreign: list[nn.Parameter],
    params: list[tuple[str, nn.Parameter]],
    rows: list[Row],
    taken: set[int],
    strange: Mapping[str, str],
) -> list[nn.Parameter]:
    """Put copies in float32 that an optimizer holds in the place of the parameters that they are copies of; return the
    others."""
    free = [i for i, (path, p) in enumerate(params) if p.requires_grad and id(p) not in taken and path not in strange]
    found = masters(foreign, [params[i][1] for i in free]) if foreign else []
    for i, master in zip(free, found, strict=False):
        params[i] = (params[i][0], master)
        rows[i] = rows[i]._replace(held=True)
        taken.add(id(master))
    return [] if found else foreign


def _row(path: str, p: nn.Parameter, owner: str, held: bool) -> Row:
    lazy = isinstance(p, nn.parameter.UninitializedParameter)
    shape = () if lazy else tuple(shape_of(p))
    return Row(path, PARAMETER, 0 if lazy else math.prod(shape), shape, owner, held, p.requires_grad)


def _check(model: nn.Module, every: Sequence[str], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if every and not select_paths(every, pattern).any():
            raise UnknownPathError(pattern, every, model_name=type(model).__name__, kind="parameter or module")
