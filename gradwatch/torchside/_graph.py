"""What autograd's graph tells of how a tensor was made: names and plain settings of its nodes. Nothing is unpacked.

Nodes outlive their backward: their settings can be read afterwards, and what was saved for backward no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["LossForm", "loss_form", "loss_pair", "unmasked_attention"]

_MAX_NODES = 2**12
_NEAR = 24
"""Nodes that are looked at around a loss."""
_ERRORS = ("NllLoss", "MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "PoissonNllLoss")
_VALUES = ("MseLoss", "SmoothL1Loss", "HuberLoss")
_SHAPES = ("View", "Reshape", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Slice", "Clone", "Alias", "T")


class LossForm(NamedTuple):
    """How a loss was made, as far as its graph tells.

    Attributes:
        of_softmax: a cross-entropy, which takes the softmax itself, of what a softmax has made.
        of_sigmoid: a binary cross-entropy of logits that a sigmoid has made.
        of_chosen: an error between numbers of which one a row was chosen by an index, as a value by its action.
        of_shares: a binary cross-entropy, whose targets are shares of 0 to 1.
    """

    of_softmax: bool = False
    of_sigmoid: bool = False
    of_chosen: bool = False
    of_shares: bool = False


def _node_of(loss: Any) -> Any:
    """Return the node that made a loss; None of what is no tensor: it may be anything, and raise when asked."""
    return loss.grad_fn if issubclass(type(loss), Tensor) else None


def loss_form(loss: Any) -> LossForm | None:
    """Return how a loss was made; None where its graph does not tell.

    Of several errors that are summed (what is real and what is fake, two heads) each may be given what a softmax or a
    sigmoid has made; what else a form says is of the one that targets belong to, and nobody knows which that is.
    """
    forms = [_form(node) for node in _errors(_node_of(loss))]
    if len(forms) == 1:
        return forms[0]
    softmax, sigmoid = (any(getattr(form, name) for form in forms) for name in ("of_softmax", "of_sigmoid"))
    return LossForm(of_softmax=softmax, of_sigmoid=sigmoid) if softmax or sigmoid else None


def _form(node: Any) -> LossForm:
    """Return how one error was made."""
    name, made = node.name(), _made_of(node)
    if name.startswith("NllLoss") and made.startswith("LogSoftmax"):
        made = _made_of(_behind(node))
    return LossForm(
        of_softmax=name.startswith("NllLoss") and made.startswith("Softmax"),
        of_sigmoid=name.startswith("BinaryCrossEntropyWithLogits") and made.startswith("Sigmoid"),
        of_chosen=name.startswith(_VALUES) and made.startswith("Gather"),
        of_shares=name.startswith("BinaryCrossEntropy"),
    )


def loss_pair(loss: Any) -> tuple[Tensor, Tensor] | None:
    """Return what a loss compares, predictions (logarithms of probabilities for classes) and targets, before backward.

    None where the graph does not tell, or where what it saved is packed by somebody's hooks: to unpack would run them.
    """
    node = _error(_node_of(loss))
    if node is None:
        return None
    with suppress(Exception):
        for name in ("self", "target"):
            if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
                return None
        return node._saved_self.detach(), node._saved_target.detach()
    return None


def unmasked_attention(outputs: Any) -> float | None:
    """Return which share of the attentions that a tensor was made by see all places; None where there is none.

    Attention as `scaled_dot_product_attention` computes it: neither causal nor given a mask.
    """
    seen = [_sees_all(node) for node in _nodes(getattr(outputs, "grad_fn", None), _MAX_NODES) if _is_attention(node)]
    return sum(seen) / len(seen) if seen else None


def _is_attention(node: Any) -> bool:
    return "DotProduct" in node.name() and hasattr(node, "_saved_is_causal")


def _sees_all(node: Any) -> bool:
    if node._saved_is_causal:
        return False
    try:
        masks = [getattr(node, name, None) for name in ("_saved_attn_mask", "_saved_attn_bias")]
    except RuntimeError:  # there was one, and backward is over
        return False
    return all(mask is None for mask in masks)


def _errors(root: Any) -> list[Any]:
    """Return the nodes of common errors near a loss."""
    return [node for node in _nodes(root, _NEAR, until=_ERRORS) if node.name().startswith(_ERRORS)]


def _error(root: Any) -> Any:
    """Return the node of a common error near a loss; None where there is none, or more than one."""
    found = _errors(root)
    return found[0] if len(found) == 1 else None


def _nodes(root: Any, most: int, until: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield nodes from a root on, nearest first; not beyond those named."""
    todo: deque[Any] = deque([] if root is None else [root])
    seen: set[Any] = set()
    while todo and len(seen) < most:
        node = todo.popleft()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not (until and node.name().startswith(until)):
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    todo.append(following)


def _behind(node: Any) -> Any:
    """Return the node that made what another took in, past changes of shape; None at a leaf."""
    following = node
    for _ in range(_NEAR):
        made = [f for f, _ in following.next_functions if f is not None]
        if len(made) != 1:
            return None
        following = made[0]
        if not following.name().startswith(_SHAPES):
            return following
    return None


def _made_of(node: Any) -> str:
    behind = None if node is None else _behind(node)
    return "" if behind is None else str(behind.name())
