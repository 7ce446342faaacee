"""QK-Clip: attention logits brought below a limit through the weights of queries and keys, head by head."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..protocols import Context
from ..records import select_paths
from ..stats import apart, attention_bound, attention_peaks
from ..torchside import Attended, AttentionTap, WeakHook, are_several, home, is_host, moved, weakly
from ._base import BaseTreatment, read_trigger
from ._checks import check_number, check_patterns
from ._qk_heads import Owner, owners_of, rescale_

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["QKClip"]


@dataclass(frozen=True, eq=False)
class QKClip(BaseTreatment):
    """Rescale the weights of queries and keys of each head whose largest attention logit was above a limit.

    After the optimizer's step both are multiplied by the root of `max_logit` over the largest logit of the step's
    forward passes, biases too; heads below the limit keep every bit. The largest logit is exact: over all samples,
    micro-batches and ranks, with scale, mask and causal flag. On the host it is not looked for where the longest query
    and key tell that none is above the limit: the `max_logit` reported is then a bound. Keys that several heads share
    are multiplied by the smallest of their factors' roots, queries by what is left of their own head's.

    Works with `nn.MultiheadAttention` and with projections under their usual names (separate or fused, Linear or
    Hugging Face's Conv1D); which rows belong to which head is found out from the lengths of queries and keys in the
    first forward pass. Of weights that ranks hold pieces of, of compiled attention, and where queries and keys are
    normalised after the projection (which bounds the logits by itself), it says so.

    Source: Kimi Team, "Kimi K2: Open Agentic Intelligence", 2025, arXiv 2507.20534, algorithm 1 (MuonClip).

    Args:
        max_logit: largest attention logit of a head.
        paths: glob patterns of modules that attend.
    """

    max_logit: float = 100.0
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _clips: list[_Clips] = field(default_factory=list, init=False, repr=False)
    order: ClassVar[int] = 70
    moves_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "max_logit", self.max_logit, above=0)
        check_patterns(self, "paths", self.paths)

    def bind(self, model: nn.Module) -> None:
        """Look for the model's attention.

        Raises:
            ConfigError: there is none whose weights can be rescaled; with what was looked for.
        """
        self._owners(model)

    def _owners(self, model: nn.Module) -> list[Owner]:
        patterns = [self.paths] if isinstance(self.paths, str) else list(self.paths)
        return owners_of(model, patterns, select_paths)

    def install(self, model: nn.Module) -> _Clips:
        """Listen to the model's attention from here on; return what takes the hooks off."""
        clips = _Clips(self._owners(model), model, self.max_logit)
        self._clips[:] = [clips]
        return clips

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        """Decide by how much each head is to be rescaled once the optimizer has stepped. Changes no gradient."""
        if not self._clips:
            return {"applied": 0.0}
        clips, trigger = self._clips[0], read_trigger(context)
        clips.due = None
        peaks = clips.take()
        # One part in 100,000 below the limit: what rounding of the weights may add.
        gamma = torch.where(peaks > self.max_logit, self.max_logit * (1 - 1e-5) / peaks, 1.0)
        gamma = torch.where(gamma > 0, gamma, 1.0)  # of an infinite logit: no factor helps
        if isinstance(trigger, Tensor):
            gamma = torch.where(moved(trigger, gamma.device), gamma, 1.0)
        elif not trigger:
            return {"applied": 0.0}
        clips.due = gamma
        clipped = (gamma < 1).sum()
        return {"applied": clipped > 0, "max_logit": peaks.max(), "coefficient": gamma.min(), "heads": clipped}

    def stepped(self, optimizer: Optimizer) -> None:
        """Rescale, now that the optimizer has moved the weights."""
        for clips in self._clips:
            clips.act()


class _Clips:
    """What one run's attention has given since the last step, and how it is to be rescaled.

    Attributes:
        grad_scale: of no concern here.
        due: factors of all heads, in order, for after the step; None: nothing.
    """

    def __init__(self, owners: list[Owner], model: nn.Module, limit: float) -> None:
        self.grad_scale, self._limit = 1.0, limit
        self.due: Tensor | None = None
        self._owners = {owner.path: owner for owner in owners}
        self._peaks: dict[str, Tensor] = {}
        self._error: Exception | None = None
        self._model = weakref.ref(model)
        self._hooks: dict[str, list[WeakHook]] = {owner.path: [] for owner in owners}
        for owner in owners:
            self._listen_to_projections(owner)
        modules = {owner.path: owner.module for owner in owners}
        self._tap = AttentionTap(modules, weakly(self._hear), weakly(self._listens, False))
        self._tap.open()

    def _listens(self) -> bool:
        model = self._model()
        return model is not None and model.training

    def _listen_to_projections(self, owner: Owner) -> None:
        owner.outputs = [None] * len(owner.projections)
        for number, projection in enumerate(owner.projections):
            hook = WeakHook(self, _Clips._keep, owner, number)
            hook.hang(projection.register_forward_hook)
            self._hooks[owner.path].append(hook)

    def _keep(self, owner: Owner, number: int, module: nn.Module, args: Any, output: Any) -> None:
        if owner.weights is None and isinstance(output, Tensor):
            owner.outputs[number] = output.detach()

    def _hear(self, path: str, attended: Attended) -> None:
        owner = self._owners[path]
        try:
            owner.settle(*apart(attended))
            self._take_off(path)
            peaks = self._peaks_of(attended)
        except Exception as error:
            # Told when the step is treated: a forward pass is no place to fail in.
            self._error = self._error or error.with_traceback(None)
            return
        known = self._peaks.get(path)
        self._peaks[path] = peaks if known is None else torch.maximum(known, moved(peaks, known.device))

    def _peaks_of(self, attended: Attended) -> Tensor:
        """Return the largest logits; on the host bounds of them, where these tell that all are below the limit."""
        bound = attention_bound(attended) if is_host(attended.q.device) else None
        return bound if bound is not None and bool((bound <= self._limit).all()) else attention_peaks(attended)

    def take(self) -> Tensor:
        """Return the largest logits of all heads since the last time, the same on all ranks; -inf where none was seen.

        Raises:
            ValueError: what attends is not what the projections give, or nothing was ever seen to attend.
        """
        error, self._error = self._error, None
        peaks, self._peaks = self._peaks, {}
        for owner in self._owners.values():
            owner.outputs = [None] * len(owner.outputs)  # of those that have not attended: held no longer
        if error is not None:
            raise error
        if not self._tap.seen:
            raise ValueError(
                f"QKClip: no attention of {', '.join(list(self._owners)[:3])} was seen in the forward pass: it is "
                "compiled, or computed by a kernel of its own (flash, flex attention)"
            )
        device = home([next(owner.module.parameters()) for owner in self._owners.values()])
        rows = torch.full((sum(o.num_heads for o in self._owners.values()),), -torch.inf, device=device)
        first = 0
        for path, owner in self._owners.items():
            if path in peaks:
                rows[first : first + len(peaks[path])] = moved(peaks[path], device, rows.dtype)
            first += owner.num_heads
        if are_several():
            dist.all_reduce(rows, op=dist.ReduceOp.MAX)
        return rows

    def act(self) -> None:
        """Rescale what is due."""
        due, self.due, self._peaks = self.due, None, {}
        if due is None or (is_host(due.device) and not bool((due < 1).any())):
            return
        first = 0
        for owner in self._owners.values():
            if owner.weights is not None:
                rescale_(owner.weights, due[first : first + len(owner.weights.q.rows)])
            first += owner.num_heads

    def _take_off(self, path: str) -> None:
        for hook in self._hooks[path]:
            hook.take_off()
        self._hooks[path] = []

    def remove(self) -> None:
        """Take the hooks off. May be called twice."""
        self._tap.close()
        for path in self._hooks:
            self._take_off(path)
