"""Names, order and owners of what is watched: the `Index`, and the parameters that it speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ..errors import ConfigError, UnknownPathError
from ..records import MODULE, PARAMETER, Index, select_paths

__all__ = ["Watched", "clean_path", "unwrap", "watched"]

_REQUIRES_GRAD = attrgetter("requires_grad")
_WRAPPER_PARTS = frozenset(
    {"_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_wrapped_module"}
)


def clean_path(path: str) -> str:
    """Return a path without the parts that wrappers put into it, so that curves keep their names (G7)."""
    return ".".join(p for p in path.split(".") if p not in _WRAPPER_PARTS)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside DDP, DataParallel, torch.compile and Fabric wrappers."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
            continue
        # torch.compile's; Fabric's, which holds the model as it was handed over beside the one it runs.
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) and hasattr(model, "_forward_module"):
            inner = getattr(model, "_original_module", None)
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
        signature: changes when parameters are added, replaced, frozen or unfrozen.
        missing: trainable parameters of the model that no optimizer holds.
    """

    index: Index
    by_id: dict[int, int]
    params: list[tuple[int, str, nn.Parameter]]
    modules: tuple[str, ...]
    signature: tuple[object, ...] = ()
    missing: tuple[str, ...] = field(default=())

    def reordered(self, forward_order: Sequence[str]) -> Index:
        """Return the index with `depth` taken from the order in which modules were first called."""
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
        return self.index


def _place(owner: str, place: dict[str, int], last: int) -> int:
    """Return the place of a module, or of the nearest one around it that was called: a part may be used without a call
    (the projection inside `MultiheadAttention`, H19)."""
    while owner:
        if owner in place:
            return place[owner]
        owner = owner.rpartition(".")[0]
    return last


def signature(model: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[object, ...]:
    """Return what tells that the watched parameters have changed: identities and `requires_grad`."""
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    # The type too: a lazy parameter keeps its identity when it materialises.
    return tuple(map(id, held)), tuple(map(_REQUIRES_GRAD, held)), tuple(map(type, held))


class _Row(NamedTuple):
    path: str
    kind: str
    numel: int
    shape: tuple[int, ...]
    owner: str
    held: bool
    trainable: bool


def watched(model: nn.Module, optimizers: Sequence[Optimizer], patterns: Sequence[str] = ("*",)) -> Watched:
    """Return what to watch of a model.

    Raises:
        UnknownPathError: a pattern matches no parameter and no module.
        ConfigError: there is no optimizer.
    """
    if not optimizers:
        raise ConfigError("gradwatch needs at least one optimizer. Got none.")
    held = {id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}
    rows: list[_Row] = []
    params: list[tuple[str, nn.Parameter]] = []
    owners = {id(m): type(m).__name__ for m in model.modules()}
    seen: set[int] = set()
    for module_path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            path = clean_path(f"{module_path}.{name}" if module_path else name)
            params.append((path, p))
            rows.append(_row(path, p, owners[id(module)], id(p) in held))
    for i, p in enumerate(q for key, q in held.items() if key not in seen):
        # Held by an optimizer but not by the model: another model's parameters, or a stale copy of this one's.
        path = f"<optimizer>.{i}"
        params.append((path, p))
        rows.append(_row(path, p, "", True))
    modules = [(clean_path(path), m) for path, m in model.named_modules() if path and clean_path(path)]
    module_rows = [_Row(path, MODULE, 0, (), type(m).__name__, False, False) for path, m in dict(modules).items()]
    chosen_params, chosen_rows = _choose(model, params, rows, module_rows, patterns)
    index = Index(
        paths=tuple(r.path for r in chosen_rows),
        kinds=tuple(r.kind for r in chosen_rows),
        numel=np.asarray([r.numel for r in chosen_rows], np.int64),
        shapes=tuple(r.shape for r in chosen_rows),
        depth=np.arange(len(chosen_rows), dtype=np.int64),
        types=tuple(r.owner for r in chosen_rows),
        in_optimizer=np.asarray([r.held for r in chosen_rows], np.bool_),
        trainable=np.asarray([r.trainable for r in chosen_rows], np.bool_),
    )
    return Watched(
        index=index,
        by_id={id(p): i for i, (_, p) in enumerate(chosen_params)},
        params=[(i, path, p) for i, (path, p) in enumerate(chosen_params) if id(p) in held],
        modules=tuple(r.path for r in chosen_rows if r.kind == MODULE),
        signature=signature(model, optimizers),
        missing=tuple(path for path, p in chosen_params if p.requires_grad and id(p) not in held),
    )


def _row(path: str, p: nn.Parameter, owner: str, held: bool) -> _Row:
    lazy = isinstance(p, nn.parameter.UninitializedParameter)
    shape = () if lazy else tuple(p.shape)
    return _Row(path, PARAMETER, 0 if lazy else p.numel(), shape, owner, held, p.requires_grad)


def _choose(
    model: nn.Module,
    params: list[tuple[str, nn.Parameter]],
    rows: list[_Row],
    module_rows: list[_Row],
    patterns: Sequence[str],
) -> tuple[list[tuple[str, nn.Parameter]], list[_Row]]:
    every = [r.path for r in (*rows, *module_rows)]
    for pattern in patterns:
        if every and not select_paths(every, pattern).any():
            raise UnknownPathError(pattern, every, model_name=type(model).__name__, kind="parameter or module")
    mask = select_paths(every, list(patterns))
    kept = [q for q, keep in zip(params, mask[: len(rows)], strict=True) if keep]
    return kept, [r for r, keep in zip((*rows, *module_rows), mask, strict=True) if keep]
