"""How attention's tensors are shown, however the model holds them: heads apart, keys and values once a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..torchside import heads_of

__all__ = ["AS_IT_IS", "Form", "Forms", "Geometry", "but_sinks", "geometry_of"]


@dataclass(frozen=True)
class Form:
    """Shows a tensor in the usual form; `back(value, as_it_was)` gives the model its own again. Views, where it can be.

    `rows` and `columns` (q, k, v, z) are (batch, positions, heads, width); `pairs` (scores, pattern) are (batch, heads,
    queries, keys).
    """

    show: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


AS_IT_IS = Form(_same, lambda value, _: value)
_SWAPPED = Form(lambda t: t.transpose(1, 2), lambda value, _: value.transpose(1, 2))


def but_sinks(form: Form, keys: int) -> Form:
    """Of a softmax that also goes over sinks, columns that are no keys and come last: the keys alone."""
    return Form(
        lambda t: form.show(t[..., :keys]),
        lambda value, was: torch.cat([form.back(value, was[..., :keys]), was[..., keys:]], dim=-1),
    )


def _split(heads: int) -> Form:
    """Batch and heads in one dimension."""
    return Form(
        lambda t: t.unflatten(0, (-1, heads)).transpose(1, 2), lambda value, _: value.transpose(1, 2).flatten(0, 1)
    )


def _split_pairs(heads: int) -> Form:
    return Form(lambda t: t.unflatten(0, (-1, heads)), lambda value, _: value.flatten(0, 1))


def _packed(heads: int) -> Form:
    """One query: the heads of a group stand where positions would."""
    return Form(
        lambda t: t.reshape(t.shape[0], heads, 1, t.shape[-1]).transpose(1, 2),
        lambda value, was: value.transpose(1, 2).reshape(was.shape),
    )


def _packed_pairs(heads: int) -> Form:
    return Form(lambda t: t.reshape(t.shape[0], heads, 1, t.shape[-1]), lambda value, was: value.reshape(was.shape))


def _grouped(groups: int, heads: int | None, *, flat: bool) -> Form:
    """Each head of keys stands `groups` times in a row: shown once."""

    def show(t: Tensor) -> Tensor:
        apart = t.unflatten(0, (-1, heads)) if flat and heads else t
        return apart[:, ::groups].transpose(1, 2)

    def back(value: Tensor, was: Tensor) -> Tensor:
        apart = value.transpose(1, 2)
        wide = apart[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
        return wide.flatten(0, 1) if flat else wide

    return Form(show, back)


class Forms:
    """The forms of one attention: of what has a row a query, a column a key, and a pair of both."""

    def __init__(self, rows: Form, pairs: Form, columns: Callable[[Tensor], Form]) -> None:
        self.rows, self.pairs, self.columns = rows, pairs, columns


@dataclass(frozen=True)
class Geometry:
    """What is known of a module's heads.

    Attributes:
        heads: how many there are, of queries; None where the module does not say.
        groups: query heads to one head of keys and values.
    """

    heads: int | None
    groups: int

    def stepwise(self, left: Tensor) -> Forms:
        """Return the forms of an attention whose left operand is this."""
        if left.dim() == 4:
            return Forms(_SWAPPED, AS_IT_IS, self._column)
        if left.dim() == 3 and self.heads and left.shape[0] % self.heads == 0:
            return Forms(_split(self.heads), _split_pairs(self.heads), lambda _: _split(self.heads or 1))
        return Forms(AS_IT_IS, AS_IT_IS, lambda _: AS_IT_IS)

    def fused(self, query: Tensor, key: Tensor) -> Forms:
        packed = (
            self.heads is not None
            and query.dim() == 4
            and query.shape[1] != self.heads
            and query.shape[1] == key.shape[1]
            and query.shape[1] * query.shape[2] == self.heads
        )
        if packed and self.heads:
            return Forms(_packed(self.heads), _packed_pairs(self.heads), self._column)
        if query.dim() == 4:
            return Forms(_SWAPPED, AS_IT_IS, self._column)
        return self.stepwise(query)

    def _column(self, tensor: Tensor) -> Form:
        if self.groups > 1 and tensor.shape[1] == self.heads:
            return _grouped(self.groups, self.heads, flat=False)
        return _SWAPPED

    def results(self, mixed: Tensor | None) -> Form:
        """Return the form of (positions * batch, heads, width), as torch's own function has it."""
        if mixed is None:
            return AS_IT_IS
        # (batch, heads, positions, d), or batch and heads in one dimension; 3 dimensions of one sample go as one.
        heads = self.heads or 1
        positions = mixed.shape[-2]
        batch = mixed.numel() // (heads * positions * mixed.shape[-1])
        return Form(
            lambda t: t.unflatten(0, (positions, batch)).transpose(0, 1),
            lambda value, was: value.transpose(0, 1).reshape(was.shape),
        )


def geometry_of(module: nn.Module) -> Geometry:
    """Return what a module, or its config, says of its heads."""
    return Geometry(*heads_of(module))
