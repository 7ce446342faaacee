"""What one operation adds to the gradient of its parameter, sample by sample: one short function per operation.

B samples, T places, R rows and C columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._rows import batch_axes, by_sample
from ._uses import Use, shape_of_node

__all__ = ["Each", "Outer", "Part", "part_of", "unpacked"]


@dataclass
class Outer:
    """A matrix for each sample, as a sum of outer products: sum over t of rows[:, t] x cols[:, t].

    Attributes:
        rows: shape (B, T, R); or (B, T), integers: the one row that a place changes.
        cols: shape (B, T, C).
        are_places: T counts the places of a sequence.
    """

    rows: Tensor
    cols: Tensor
    are_places: bool = False

    @property
    def is_chosen(self) -> bool:
        return self.rows.dim() == 2

    def turned(self) -> Outer:
        return Outer(self.cols, self.rows, self.are_places)


@dataclass
class Each:
    """Gradients of the samples as they are, some at a time: `some(start, stop)` has shape (stop - start, ...)."""

    some: Callable[[int, int], Tensor]


Part = Outer | Each
Maker = Callable[[int], "Part | None"]
"""Makes the part; takes which dimension counts the samples, where several may."""


def part_of(use: Use, grads: Sequence[Tensor | None], size: int) -> Maker | None:
    """Return what makes the part of one use; None where the operation is not known.

    Called while backward stands before the operation, whose inputs are at hand.

    Args:
        use: of a parameter.
        grads: gradients of what the operation has made.
        size: B.
    """
    kind = _KINDS.get(use.node.name())
    if kind is None or not grads or grads[0] is None or _is_packed(use.node):
        return None
    return kind(use, grads[0].detach(), size)


def unpacked(tensor: Tensor) -> Tensor:
    """Return what was saved as it is: the hook under which a graph is made that this file can read."""
    return tensor


def _is_packed(node: Any) -> bool:
    """Return whether somebody packs what the node has saved, as checkpoints do: it may be unpacked only once."""
    names = [name for name in dir(node) if name.startswith("_raw_saved_")]
    hooks = [getattr(node, name).unpack_hook for name in names[:1]]
    return any(hook is not None and hook is not unpacked for hook in hooks)


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _lead(use: Use, num: int, argument: int) -> Sequence[int] | None:
    """Return the dimensions that the rows of a product came of: they lie flat for the product alone."""
    shapes = [shape_of_node(n) for n in use.consumers if n.name() in ("ViewBackward0", "UnsafeViewBackward0")]
    following, _ = use.node.next_functions[argument]
    if following is not None and following.name() in ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"):
        shapes.append(tuple(int(n) for n in following._saved_self_sym_sizes))
    for shape in shapes:
        for end in range(len(shape), 0, -1):
            if math.prod(shape[:end]) == num:
                # Of dimensions of length 1 at the end nobody knows which they are.
                return shape[:end]
    return None


def _product(use: Use, grad: Tensor, size: int, *, left: Tensor, argument: int) -> Maker:
    lead = _lead(use, len(left), argument)

    def make(choice: int) -> Part | None:
        rows, cols = (by_sample(_wide(x), lead, size, choice) for x in (left, grad))
        if rows is None or cols is None:
            return None
        made = Outer(rows, cols, are_places=rows.size(1) > 1)
        return made.turned() if use.is_transposed else made

    return make


def _mm(use: Use, grad: Tensor, size: int) -> Maker | None:
    return _product(use, grad, size, left=use.node._saved_self, argument=0) if use.argument == 1 else None


def _addmm(use: Use, grad: Tensor, size: int) -> Maker | None:
    if use.argument == 2:
        return _product(use, grad, size, left=use.node._saved_mat1, argument=1)
    if use.argument != 0:
        return None
    lead = _lead(use, len(grad), 1)

    def make(choice: int) -> Part | None:
        rows = by_sample(_wide(grad), lead, size, choice)
        return None if rows is None else _direct(rows.sum(1))

    return make


def _direct(each: Tensor) -> Each:
    return Each(lambda start, stop: each[start:stop])


def _looked_up(use: Use, grad: Tensor, size: int) -> Maker | None:
    if use.argument != 0 or use.is_transposed:
        return None
    indices, padding = use.node._saved_indices, int(use.node._saved_padding_idx)
    padding = padding - 2**64 if padding >= 2**63 else padding

    def make(choice: int) -> Part | None:
        axes = batch_axes((*indices.shape, 1), size)
        if not axes:
            return None
        axis = axes[choice % len(axes)]
        chosen = indices.movedim(axis, 0).reshape(size, -1)
        cols = _wide(grad).movedim(axis, 0).reshape(size, chosen.size(1), -1)
        return Outer(chosen, cols * (chosen != padding).unsqueeze(-1), are_places=chosen.size(1) > 1)

    return make


def _bag(use: Use, grad: Tensor, size: int) -> Maker | None:
    node = use.node
    indices, offsets, mode = node._saved_indices, node._saved_offsets, int(node._saved_mode)
    if use.argument != 0 or mode > 1 or len(grad) != size or indices.numel() % size:
        return None
    num = indices.numel() // size
    weights = node._saved_per_sample_weights
    even = torch.equal(offsets[:size].cpu(), torch.arange(size) * num)
    if not even or weights is not None or int(node._saved_padding_idx) < node._saved_weight_sym_argsize_0:
        return None
    cols = (_wide(grad) / (num if mode == 1 else 1)).unsqueeze(1).expand(-1, num, -1)
    return lambda choice: Outer(indices.reshape(size, num), cols)


def _convolution(use: Use, grad: Tensor, size: int) -> Maker | None:
    if use.argument == 2:
        return _summed_over(use, grad, size, 1.0, axes_kept=(1,))
    node, weight = use.node, use.node._saved_weight
    image = node._saved_input
    if use.argument != 1 or len(grad) != size:
        return None

    def one(g: Tensor, x: Tensor) -> Tensor:
        result = torch.ops.aten.convolution_backward(
            g.unsqueeze(0),
            x.unsqueeze(0),
            weight,
            None,
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            node._saved_transposed,
            node._saved_output_padding,
            node._saved_groups,
            (False, True, False),
        )
        return result[1]

    some = torch.func.vmap(one)
    return lambda choice: Each(lambda start, stop: _wide(some(grad[start:stop], image[start:stop])))


def _scaled(use: Use, grad: Tensor, normed: Tensor, size: int, **kept: Any) -> Maker | None:
    """Of an operation that multiplies what it has normalised by its first parameter and adds its second."""
    return _summed_over(use, grad, size, normed if use.argument == 1 else 1.0, **kept)


def _layer_norm(use: Use, grad: Tensor, size: int) -> Maker | None:
    node = use.node
    normed = (_wide(node._saved_input) - node._saved_result1) * node._saved_result2
    return _scaled(use, grad, normed, size)


def _rms_norm(use: Use, grad: Tensor, size: int) -> Maker | None:
    node = use.node
    return _scaled(use, grad, _wide(node._saved_input) * node._saved_result1, size) if use.argument == 1 else None


def _group_norm(use: Use, grad: Tensor, size: int) -> Maker | None:
    node = use.node
    image = _wide(node._saved_input)
    grouped = image.reshape(image.size(0), int(node._saved_group), -1)
    mean, scale = (x.reshape(image.size(0), -1, 1) for x in (node._saved_result1, node._saved_result2))
    normed = ((grouped - mean) * scale).reshape(image.shape)
    return _scaled(use, grad, normed, size, axes_kept=(1,))


def _batch_norm(use: Use, grad: Tensor, size: int) -> Maker | None:
    node = use.node
    image = _wide(node._saved_input)
    if getattr(node, "_saved_training", True):
        mean, scale = node._saved_result1, node._saved_result2
    else:
        mean, scale = node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()
    by_channel = (1, -1, *[1] * (image.dim() - 2))
    normed = (image - mean.reshape(by_channel)) * scale.reshape(by_channel)
    return _scaled(use, grad, normed, size, axes_kept=(1,))


def _summed_over(
    use: Use, grad: Tensor, size: int, factor: Tensor | float, *, axes_kept: tuple[int, ...] = ()
) -> Maker:
    """Of an operation in which one element of the parameter stood for many of its output.

    Args:
        factor: what the gradient of the output is multiplied by.
        axes_kept: the parameter lies along these dimensions of the output; by default along its last ones.
    """
    shape = use.carry(use.param.detach()).shape

    def make(choice: int) -> Part | None:
        full = (1,) * (grad.dim() - len(shape)) + tuple(shape)
        axes = [a for a in batch_axes((*grad.shape, 1), size) if axes_kept == () or a not in axes_kept]
        # A dimension along which the parameter was not repeated can't count samples.
        axes = [a for a in axes if axes_kept or full[a] == 1 or size == 1]
        each = _wide(grad) * factor
        if axes:
            axis = axes[choice % len(axes)]
        elif grad.dim() == 2 and grad.size(0) % size == 0 and not axes_kept and full[0] == 1:
            return _direct(each.reshape(size, -1, grad.size(1)).sum(1).reshape(size, *shape))
        else:
            return None
        kept = axes_kept or [a for a in range(grad.dim()) if full[a] == grad.shape[a] and a != axis]
        over = [a for a in range(grad.dim()) if a != axis and a not in kept]
        return _direct((each.sum(over) if over else each).movedim(_after(axis, over), 0).reshape(size, *shape))

    return make


def _after(axis: int, removed: Sequence[int]) -> int:
    return axis - sum(r < axis for r in removed)


def _add(use: Use, grad: Tensor, size: int) -> Maker | None:
    alpha = float(use.node._saved_alpha) if use.argument == 1 else 1.0
    sign = -1.0 if use.node.name() == "SubBackward0" and use.argument == 1 else 1.0
    return _summed_over(use, grad, size, alpha * sign)


def _mul(use: Use, grad: Tensor, size: int) -> Maker | None:
    other = use.node._saved_other if use.argument == 0 else use.node._saved_self
    return None if other is None else _summed_over(use, grad, size, _wide(other))


def _expand(use: Use, grad: Tensor, size: int) -> Maker | None:
    return _summed_over(use, grad, size, 1.0)


_KINDS: Mapping[str, Callable[[Use, Tensor, int], Maker | None]] = {
    "MmBackward0": _mm,
    "AddmmBackward0": _addmm,
    "EmbeddingBackward0": _looked_up,
    "EmbeddingBagBackward0": _bag,
    "ConvolutionBackward0": _convolution,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "AddBackward0": _add,
    "SubBackward0": _add,
    "MulBackward0": _mul,
    "ExpandBackward0": _expand,
}
