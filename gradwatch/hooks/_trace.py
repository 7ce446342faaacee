"""One forward pass of a model, written down: which modules were called in which order, and what came of what.

The pass runs on a copy of the model that shares its parameters: hooks of the user's are not on it, buffers are its own,
and the state of random numbers is put back.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..torchside import PRODUCTS, past_override, random_state, set_random_state, takes_hooks, tensors_of
from ._einsum import Contraction, contraction

__all__ = ["Attend", "Call", "Op", "Trace", "trace"]


@dataclass
class Call:
    """A module's call: tensors by leaf, and when it began and ended, counted in functions."""

    path: str
    module: nn.Module
    parent: str
    begin: int
    inputs: list[tuple[str, int]]
    outputs: list[tuple[str, int]] = field(default_factory=list)
    end: int = -1
    is_leaf: bool = True


@dataclass(frozen=True)
class Op:
    """A torch function: the tensors that went in and came out, and the module it was called in."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    path: str
    product: Contraction | None = None


@dataclass(frozen=True)
class Attend:
    """One attention: its tensors as the model holds them; of queries and keys, how many there are; heads, if told."""

    path: str
    q: int
    k: int
    v: int
    z: int
    when: int
    queries: int
    keys: int
    heads: int | None


class Trace:
    """What was seen.

    Attributes:
        calls: in the order they began.
        ops: in the order they ended.
        tensors: by id, all of them alive.
        attends: what attended, in order.
        maker: id of a tensor -> number of the function that made it.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ops: list[Op] = []
        self.tensors: dict[int, Tensor] = {}
        self.maker: dict[int, int] = {}
        self.attends: list[Attend] = []

    def know(self, tree: Any) -> list[tuple[str, int]]:
        found = list(tensors_of(tree))
        pairs = [(leaf, id(tensor)) for leaf, tensor in found]
        self.tensors.update((id(tensor), tensor) for _, tensor in found)
        return pairs

    def find_attends(self) -> None:
        """Find a fused function, or a product, a softmax and a product, within one module."""
        products: dict[str, int] = {}
        softmaxes: dict[str, tuple[int, int]] = {}
        for number, op in enumerate(self.ops):
            if op.name == "scaled_dot_product_attention":
                q, k, v = op.inputs[:3]
                keys = self.tensors[k].shape[-2]
                self.attends.append(self._attend(op, q, k, v, number, keys))
            elif op.name in PRODUCTS or op.product is not None:
                left = self.tensors[op.inputs[-2]] if len(op.inputs) > 1 else None
                pair = softmaxes.get(op.path)
                mixes = op.product is None or op.product.of_values is not None
                if pair and mixes and left is not None and _goes_over(self.tensors[self.ops[pair[1]].outputs[0]], left):
                    first = self.ops[pair[0]]
                    q, k = first.inputs[-2:]
                    keys = self.tensors[first.outputs[0]].shape[-1]
                    self.attends.append(self._attend(op, q, k, op.inputs[-1], number, keys))
                    softmaxes.pop(op.path)
                    products.pop(op.path, None)
                elif op.product is None or op.product.of_scores is not None:
                    products[op.path] = number
            elif op.name == "softmax" and op.path in products:
                product = self.ops[products[op.path]]
                if _goes_over(self.tensors[op.inputs[0]], self.tensors[product.outputs[0]]):
                    softmaxes[op.path] = (products[op.path], number)

    def _attend(self, op: Op, q: int, k: int, v: int, when: int, keys: int) -> Attend:
        z = self.tensors[op.outputs[0]]
        if op.product is not None:
            orders = op.product.of_values
            z = z if orders is None else z.permute(orders[1])
        heads = z.shape[1] if z.dim() == 4 else None
        return Attend(op.path, q, k, v, op.outputs[0], when, z.shape[-2], keys, heads)


def _goes_over(softmax: Tensor, pairs: Tensor) -> bool:
    """Return whether a softmax goes over these pairs: of queries and keys, or of a sink besides."""
    if not (softmax.dim() and pairs.dim()):
        return False
    rows, keys = softmax.shape[:-1].numel(), softmax.shape[-1]
    return rows == pairs.shape[:-1].numel() and keys - pairs.shape[-1] in (0, 1)


class _Recorder(TorchFunctionMode):
    def __init__(self, seen: Trace, stack: list[str]) -> None:
        super().__init__()
        self.seen, self.stack = seen, stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:
                return past_override(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if name != "__get__":
            outputs = tuple(i for _, i in self.seen.know(out))
            inputs = tuple(i for _, i in self.seen.know([args, kwargs]))
            if outputs:
                number = len(self.seen.ops)
                self.seen.ops.append(Op(name, inputs, outputs, self.stack[-1], contraction(func, args)))
                for one in outputs:
                    if one not in inputs:
                        self.seen.maker.setdefault(one, number)
        return out


def trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trace:
    """Run one forward pass, without gradients and in eval mode, and return what was seen."""
    shadow = _shadow(model)
    seen = Trace()
    stack = [""]
    open_calls: list[Call] = []

    def before(module: nn.Module, given: Any, named: Any, *, path: str) -> None:
        for call in open_calls[-1:]:
            call.is_leaf = False
        bare = given[0] if len(given) == 1 and not named else {**{str(i): a for i, a in enumerate(given)}, **named}
        call = Call(path, module, stack[-1], len(seen.ops), seen.know(bare))
        seen.calls.append(call)
        open_calls.append(call)
        stack.append(path)

    def after(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        stack.pop()
        call = open_calls.pop()
        call.outputs, call.end = seen.know(output), len(seen.ops)

    for path, module in shadow.named_modules():
        if not takes_hooks(module):
            continue

        def begin(module: nn.Module, given: Any, named: Any, path: str = path) -> None:
            before(module, given, named, path=path)

        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)
    state = random_state()
    try:
        with torch.no_grad(), _Recorder(seen, stack):
            shadow(*args, **kwargs)
    finally:
        set_random_state(state)
    seen.find_attends()
    return seen


def _shadow(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares parameters, and has no hooks."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        for name, held in vars(module).items():
            if "hook" in name and isinstance(held, dict):
                memo[id(held)] = OrderedDict() if isinstance(held, OrderedDict) else {}
    # What is in the memo by its number must stay alive as long as the memo.
    memo[id(memo)] = [model]
    return copy.deepcopy(model, memo).eval()


def ids(pairs: Iterable[tuple[str, int]]) -> list[int]:
    return [one for _, one in pairs]
