"""Each rank's own gradient norm, before gradients are averaged over ranks: names the rank that is bad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._warn import one_line
from ..errors import UnreadableError
from ..stats import At, Ranks, global_norm, tensor_norms
from ..torchside import Aside, StandIn, WeakHook, moved
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter
from ._options import MeasureOptions

__all__ = ["LocalNorms"]


class LocalNorms(Measurement):
    """Measures gradients at the moment they are complete on this rank, through hooks on the parameters.

    Under DDP that is before the all-reduce; with accumulation under `no_sync` it is the sum over micro-batches so far,
    and the last one counts. Under FSDP2 such a hook comes after the reduce-scatter: sharded parameters are left out.
    """

    part = "the ranks' own gradient norms"

    def __init__(self, meter: ModelMeter) -> None:
        super().__init__(meter)
        self._handles: list[Any] = []
        self._norms: dict[int, Tensor] = {}
        self.num_sharded = 0
        self.failure = ""
        self.follow()

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        return options.local_norms

    def follow(self) -> None:
        self.attach(p for _, _, p in self.meter.watched.params)
        self.meter.account.has_own_hooks = True

    def attach(self, params: Iterable[Tensor]) -> None:
        """Listen to these parameters, and to no others."""
        self.close()
        self.num_sharded = 0
        for p in params:
            if isinstance(p, StandIn) or type(p.data) is not Tensor:
                self.num_sharded += 1
            elif p.requires_grad and p.is_leaf:
                self._handles.append(WeakHook.of(self.note).hang(p.register_post_accumulate_grad_hook))

    def note(self, param: Tensor) -> None:
        """Keep the norm of one gradient."""
        try:
            with Aside():
                if param.grad is not None:
                    self._norms[id(param)] = tensor_norms([param.grad.detach()])[0]
        except UnreadableError:
            self._norms.pop(id(param), None)
        except Exception as error:
            # In the midst of backward nothing may escape.
            self.failure = one_line(error)
            self.close()

    def take(self, scale: float) -> Tensor | None:
        """Return the norm over all parameters since the last time, free of the loss scale; None if none was seen."""
        norms, self._norms = list(self._norms.values()), {}
        return global_norm(torch.stack(norms)) / scale if norms else None

    def tables(self, ranks: Ranks) -> Mapping[str, tuple[int, ...]]:
        return {"norms": (ranks.num,)}

    def look(self, view: StepView, tables: dict[str, Tensor]) -> None:
        own = self.take(view.loss_scale)
        if own is not None:
            tables["norms"][view.rank] = moved(own, tables["norms"].device)

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        norms = found["norms"]
        return {f"local_norm/{rank}": float(norm) for rank, norm in enumerate(norms)} if norms.any() else {}

    def notes(self) -> list[str]:
        notes = []
        if self.num_sharded:
            notes.append(f"local norms leave out {self.num_sharded} sharded parameters: FSDP reduces first")
        if self.failure:
            notes.append(f"local norms were switched off: {self.failure}")
        return notes

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._norms = [], {}
