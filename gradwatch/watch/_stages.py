"""One index for all stages of a pipeline: every rank watches its own parameters, and stand-ins for the others'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._warn import warn
from ..errors import ConfigError
from ..torchside import Away, Pipeline, largest_piece, real_of

__all__ = ["Found", "Row", "Stages", "model_of", "on_all_stages"]


class Row(NamedTuple):
    """One line of the index."""

    path: str
    kind: str
    numel: int
    shape: tuple[int, ...]
    owner: str
    held: bool
    trainable: bool


class Found(NamedTuple):
    """What was found in a model.

    Attributes:
        rows: of the parameters.
        params: likewise.
        owners: ids of the modules that hold them; of what is in none, 0.
        taken: ids of those that an optimizer holds.
        strange: path -> why nothing can be said of it.
        modules: rows of modules.
    """

    rows: list[Row]
    params: list[tuple[str, nn.Parameter]]
    owners: list[int]
    taken: set[int]
    strange: dict[str, str]
    modules: list[Row]


class _Member(NamedTuple):
    """What the ranks tell each other of a parameter.

    Attributes:
        number: of the optimizer that holds it, among its rank's; -1 for none.
        most: elements of the largest piece of it.
    """

    row: Row
    stage: int
    number: int
    dtype: torch.dtype
    most: int
    why: str


class Stages:
    """What a pipeline's parameters are to this rank.

    Args:
        pipeline: whose.
        optimizers: of this rank.
    """

    def __init__(self, pipeline: Pipeline, optimizers: Sequence[Optimizer]) -> None:
        self.pipeline = pipeline
        self._optimizers = tuple(optimizers)
        self._numbers: dict[int, int] = {}
        self._blanks: dict[int, Away] = {}

    def held_by(self, optimizers: Sequence[Optimizer]) -> set[int]:
        """Return ids of the stand-ins for what the same optimizers hold on other ranks, by their number."""
        mine = {i for i, o in enumerate(self._optimizers) if any(o is other for other in optimizers)}
        return {key for key, number in self._numbers.items() if number in mine}

    def note(self, p: Tensor, blank: Away, number: int) -> None:
        """Say what stands for a parameter: at every step, or where it has no gradient."""
        if p is blank:
            self._numbers[id(p)] = number
        self._blanks[id(p)] = blank

    @property
    def blanks(self) -> Mapping[int, Away]:
        """Id of a parameter -> what stands for it where it has no gradient; a stand-in's own is itself."""
        return self._blanks


def model_of(given: Any, unwrap: Callable[[nn.Module], nn.Module], *, has_surgery: bool = False) -> nn.Module:
    """Return a model as it is, and the stages of a pipeline on this rank as one.

    Args:
        given: a model; a schedule of `torch.distributed.pipelining`, one stage, or a list of this rank's.
        unwrap: takes a stage's module out of its wrappers.
        has_surgery: gradients of single tasks are asked for.

    Raises:
        ConfigError: it is none of these; stages are of different pipelines; surgery in a pipeline.
    """
    if isinstance(given, nn.Module):
        return given
    stages = getattr(given, "_stages", None) or getattr(given, "_stage", None) or given
    stages = list(stages) if isinstance(stages, (list, tuple)) else [stages]
    if not stages or not all(_is_stage(stage) for stage in stages):
        raise ConfigError(
            "`model` must be a torch.nn.Module, or a schedule of torch.distributed.pipelining (or its stages on this "
            f"rank). Got {type(given).__name__}."
        )
    if has_surgery:
        raise ConfigError("surgery needs the losses of all tasks on every rank: in a pipeline the last stage has them.")
    group, count = stages[0].group, stages[0].num_stages
    if any(stage.group is not group or stage.num_stages != count for stage in stages):
        raise ConfigError("the stages given to gradwatch belong to different pipelines. Give those of one.")
    parts = getattr(given, "_n_microbatches", 1) if getattr(given, "scale_grads", False) else 1
    return Pipeline({stage.stage_index: unwrap(stage.submod) for stage in stages}, group, parts)


def _is_stage(value: Any) -> bool:
    return isinstance(getattr(value, "submod", None), nn.Module) and hasattr(value, "stage_index")


def on_all_stages(pipeline: Pipeline, found: Found, optimizers: Sequence[Optimizer]) -> tuple[Found, Stages]:
    """Return what was found on all ranks, in the order of stages; the same on each of them, and for good.

    Raises:
        ConfigError: ranks have different numbers of optimizers.
    """
    counts = pipeline.told("optimizers", len(optimizers))
    if len(set(counts)) > 1:
        raise ConfigError(
            f"every rank of a pipeline needs as many optimizers as the others. Got {counts}, rank by rank."
        )
    # Counted by each rank anew where its model changes in mid run; what the others know stays what it was.
    members = pipeline.told("parameters", _members(pipeline, found, optimizers))
    modules = [row for rows in pipeline.told("modules", found.modules) for row in rows]
    local, stages = dict(found.params), Stages(pipeline, optimizers)
    merged = Found([], [], [], set(), {}, list({row.path: row for row in modules}.values()))
    numbered = [(rank, member) for rank, told in enumerate(members) for member in told]
    mine, empty = _rank_in(pipeline), _empties(found)
    for rank, member in sorted(numbered, key=lambda pair: pair[1].stage):
        p = local.pop(member.row.path, None) if rank == mine else None
        _add(merged, stages, member, p if _fits(p, member) else None, empty(member.dtype), is_here=rank == mine)
    pipeline.join(p for _, p in merged.params if not isinstance(p, Away))
    if local:
        warn(
            f"a stage of the pipeline has parameters that were not there when the watch began ({next(iter(local))!r} "
            "and others): they are not seen. Make a new Watch, on all ranks."
        )
    return merged, stages


def _rank_in(pipeline: Pipeline) -> int:
    return torch.distributed.get_rank(pipeline.group)


def _empties(found: Found) -> Any:
    device = found.params[0][1].device if found.params else torch.device("cpu")
    return lambda dtype: torch.empty(0, dtype=dtype, device=device)


def _members(pipeline: Pipeline, found: Found, optimizers: Sequence[Optimizer]) -> list[_Member]:
    places, last = pipeline.owners(), pipeline.numbers[-1]
    holder = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    return [
        _Member(
            row,
            places.get(owner, last),
            holder.get(id(real_of(p)), -1) if id(p) in found.taken else -1,
            p.dtype,
            largest_piece(p),
            found.strange.get(path, ""),
        )
        for row, (path, p), owner in zip(found.rows, found.params, found.owners, strict=True)
    ]


def _fits(p: Any, member: _Member) -> bool:
    return p is not None and tuple(p.shape) == member.row.shape and p.dtype is member.dtype


def _add(merged: Found, stages: Stages, member: _Member, p: Any, empty: Tensor, *, is_here: bool) -> None:
    path, away = member.row.path, stages.pipeline.away
    blank = away.get(path)
    if blank is None or (p is not None and blank.behind is not p):
        trains = member.row.trainable
        blank = away[path] = Away.of(
            stages.pipeline, empty, member.row.shape, member.most, trains=trains, is_here=is_here, p=p
        )
    shown = blank if p is None else p
    stages.note(shown, blank, member.number)
    merged.rows.append(member.row._replace(trainable=shown.requires_grad))
    merged.params.append((path, shown))
    merged.owners.append(0)
    if member.number >= 0:
        merged.taken.add(id(shown))
    if member.why:
        merged.strange[path] = member.why
