"""Tensors of every layout, each with the elements that it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LAYOUTS", "SPARSE", "Layout", "elements"]


@dataclass(frozen=True)
class Layout:
    """`make` lays a dense matrix out; the same done to its numpy twin gives what is expected, as `twin` says."""

    name: str
    make: Callable[[Tensor], Tensor]
    twin: Callable[[np.ndarray], np.ndarray]


def _nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    def make(x: Tensor) -> Tensor:
        rows = [x[: len(x) // 2].contiguous(), x[len(x) // 2 :].contiguous()]
        return torch.nested.nested_tensor(rows, layout=layout)

    return make


def _uncoalesced(x: Tensor) -> Tensor:
    sparse = x.to_sparse()
    index = torch.cat([sparse.indices(), sparse.indices()], dim=1)
    shares = torch.cat([torch.zeros_like(sparse.values()), sparse.values()])
    return torch.sparse_coo_tensor(index, shares, x.shape)


def _four(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], 1, 1).expand(-1, -1, 2, 3).contiguous(memory_format=torch.channels_last)


LAYOUTS = [
    Layout("dense", lambda x: x, lambda x: x),
    Layout("column", lambda x: x[:, 0], lambda x: x[:, 0]),
    Layout("every-second", lambda x: x.flatten()[::2], lambda x: x.flatten()[::2]),
    Layout("transposed", lambda x: x.t(), lambda x: x),
    Layout("window", lambda x: x[1:, 1:], lambda x: x[1:, 1:]),
    Layout("channels-last", _four, lambda x: np.repeat(x, 6)),
    Layout("expanded", lambda x: x[0, 0].expand(1000), lambda x: np.repeat(x[0, 0], 1000)),
    Layout("rows-expanded", lambda x: x[:, None, :].expand(-1, 5, -1), lambda x: np.repeat(x, 5)),
    Layout("column-expanded", lambda x: x[:, :1].expand(-1, 20), lambda x: np.repeat(x[:, :1], 20)),
    Layout("windows", lambda x: x.unfold(1, 2, 1), lambda x: np.concatenate([x[:, :-1], x[:, 1:]])),
    Layout("scalar", lambda x: x[0, 0], lambda x: x[0, 0]),
    Layout("empty", lambda x: x[:0], lambda x: x[:0]),
    Layout("negated", lambda x: torch._neg_view(x), lambda x: -x),
    Layout("negated-column", lambda x: torch._neg_view(x)[:, 0], lambda x: -x[:, 0]),
    Layout("zeros-without-memory", lambda x: torch._efficientzerotensor((5,), dtype=x.dtype), lambda x: np.zeros(5)),
    Layout("subclass", lambda x: x.as_subclass(Tagged), lambda x: x),
]
"""Of any real floating dtype of 16 bits or more."""


class Tagged(Tensor):
    """A tensor with a name of its own and nothing else."""


SPARSE = [
    Layout("coo", lambda x: x.to_sparse(), lambda x: x),
    Layout("coo-hybrid", lambda x: x.to_sparse(1), lambda x: x),
    Layout("coo-uncoalesced", _uncoalesced, lambda x: x),
    Layout("csr", lambda x: x.to_sparse_csr(), lambda x: x),
    Layout("csc", lambda x: x.to_sparse_csc(), lambda x: x),
    Layout("bsr", lambda x: x.to_sparse_bsr((2, 1)), lambda x: x),
    Layout("nested", _nested(torch.strided), lambda x: x),
    Layout("jagged", _nested(torch.jagged), lambda x: x),
]


def elements(tensor: Tensor) -> np.ndarray:
    """Return a dense real tensor's elements as float64."""
    return tensor.double().numpy()
