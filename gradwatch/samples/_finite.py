"""Which samples of a batch were the first that are not finite, before normalisation or a mean spread it to the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..torchside import tensors_of

__all__ = ["FirstBad"]


class FirstBad:
    """While it looks, checks what modules are given and make, until the first value that is not finite.

    Args:
        size: B.

    Attributes:
        rows: bool, shape (B,): samples that hold the first such values; None where there are none, or where all
            samples went bad at once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: NDArray[np.bool_] | None = None
        self._is_over = False

    @contextmanager
    def looking(self, model: nn.Module) -> Iterator[None]:
        """Look on while the model runs."""
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after).remove)
            yield

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._see([args, kwargs])

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._see(output)

    def _see(self, tree: Any) -> None:
        if self._is_over:
            return
        with torch.no_grad():
            for _, tensor in tensors_of(tree, objects=True):
                if tensor.is_floating_point() and tensor.dim() and not bool(torch.isfinite(tensor).all()):
                    self._found(tensor)
                    return

    def _found(self, tensor: Tensor) -> None:
        self._is_over = True
        if tensor.size(0) % self.size:
            return
        bad = (~torch.isfinite(tensor.detach())).reshape(self.size, -1).any(1)
        if not bool(bad.all()):
            self.rows = bad.cpu().numpy()
