"""How much the gradients of several tasks agree. Shape suffix: T = tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..torchside import home, moved, wide_dtype
from ._shards import Shards

__all__ = ["cosines", "gramian"]

_CHUNK = 1 << 18


@torch.no_grad()
def gramian(grads_per_task: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Return the inner products of each two task gradients, each seen as one vector over all parameters.

    Sums are in float64, through copies of at most 2 MiB a task, so that gradients of 1e-30 keep their digits.

    Args:
        grads_per_task: one sequence of gradients per task, in the same order of parameters; None counts as zeros.

    Returns:
        float64, shape (tasks, tasks), symmetric. nan or inf where a task's gradient holds one.

    Raises:
        ValueError: the tasks have different numbers of gradients.
    """
    tasks = len(grads_per_task)
    if len({len(grads) for grads in grads_per_task}) > 1:
        raise ValueError(
            f"`gramian` needs one gradient (or None) per parameter from every task. "
            f"Got {[len(grads) for grads in grads_per_task]} gradients."
        )
    device, parts, whole = home(g for grads in grads_per_task for g in grads if g is not None), [], []
    wide = wide_dtype(device)
    totals: dict[torch.device, Tensor] = {}
    for grads in zip(*grads_per_task, strict=True):
        present = [(task, grad) for task, grad in enumerate(grads) if grad is not None]
        if not present:
            continue
        shards = Shards([_dense(grad) for _, grad in present])
        here = shards.locals[0].device
        if shards.groups:
            part_TT = torch.zeros(tasks, tasks, dtype=wide_dtype(here), device=here)
            parts.append(part_TT)
            whole.append(present[0][1])
        else:
            if here not in totals:
                totals[here] = torch.zeros(tasks, tasks, dtype=wide_dtype(here), device=here)
            part_TT = totals[here]
        _add_products_(part_TT, [task for task, _ in present], shards.locals)
    total_TT = torch.zeros(tasks, tasks, dtype=wide, device=device)
    for part_TT in totals.values():
        total_TT += moved(part_TT, device, wide)
    if parts:
        total_TT += Shards(whole).sum_(torch.stack(parts)).sum(dim=0)
    return total_TT


def _add_products_(total_TT: Tensor, tasks: list[int], pieces: list[Tensor]) -> None:
    for chunks in zip(*(piece.view(-1).split(_CHUNK) for piece in pieces), strict=True):
        rows = torch.zeros(len(total_TT), chunks[0].numel(), dtype=total_TT.dtype, device=total_TT.device)
        for task, chunk in zip(tasks, chunks, strict=True):
            rows[task].copy_(chunk)
        total_TT.addmm_(rows, rows.T)


def _dense(grad: Tensor) -> Tensor:
    """Return a tensor whose memory is in the order of its shape: two tasks' gradients may differ in strides."""
    if grad.layout is not torch.strided:
        return grad.to_dense()
    return grad.contiguous()


def cosines(gramian: Tensor) -> Tensor:
    """Return the cosine of the angle between each two task gradients, from their Gramian.

    Returns:
        Shape (tasks, tasks), in [-1, 1]; the diagonal is 1. Two tasks conflict where it is negative. Rows and columns
        of an all-zero gradient are 0, of a non-finite one nan.
    """
    norms = gramian.diagonal().sqrt()
    # Dividing twice: the product of two norms leaves float64 before either does.
    safe = torch.where(norms == 0, 1.0, norms)
    return (gramian / safe[:, None] / safe[None, :]).clamp(-1.0, 1.0)
