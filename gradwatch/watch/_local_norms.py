"""Each rank's own gradient norm, before gradients are averaged over ranks: names the rank that is bad."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..stats import flat_local, global_norm, tensor_norms

__all__ = ["LocalNorms"]


class _Inert:
    """What a hook becomes in a copied or unpickled model: nothing (H14)."""

    def __call__(self, param: Tensor) -> None:
        return None


class _Hook:
    """Holds its owner weakly; inert on copies."""

    def __init__(self, owner: LocalNorms) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, param: Tensor) -> None:
        owner = self._owner()
        if owner is not None:
            owner.note(param)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class LocalNorms:
    """Measures gradients at the moment they are complete on this rank, through hooks on the parameters.

    Under DDP that is before the all-reduce; with accumulation under `no_sync` it is the sum over micro-batches so far,
    and the last one counts. Under FSDP2 such a hook comes after the reduce-scatter: sharded parameters are left out.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._norms: dict[int, Tensor] = {}
        self.num_sharded = 0
        self.failure = ""

    def attach(self, params: Iterable[Tensor]) -> None:
        """Listen to these parameters, and to no others."""
        self.close()
        self.num_sharded = 0
        for p in params:
            if type(p.data) is not Tensor:
                self.num_sharded += 1
            elif p.requires_grad and p.is_leaf:
                self._handles.append(p.register_post_accumulate_grad_hook(_Hook(self)))

    @torch.no_grad()
    def note(self, param: Tensor) -> None:
        """Keep the norm of one gradient."""
        try:
            if param.grad is not None:
                self._norms[id(param)] = tensor_norms([flat_local(param.grad.detach())])[0]
        except Exception as error:
            # In the midst of backward nothing may escape (H10).
            self.failure = f"{type(error).__name__}: {error}"
            self.close()

    def take(self, scale: float) -> Tensor | None:
        """Return the norm over all parameters since the last time, free of the loss scale; None if none was seen."""
        norms, self._norms = list(self._norms.values()), {}
        return global_norm(torch.stack(norms)) / scale if norms else None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._norms = [], {}
