"""About forty awkward modules, over which everything that hooks or measures a model has to hold.

`zoo()` gives the cases. `case.make()` builds one from a fixed seed: model, args, kwargs; `case.loss(output)` is a
scalar to call backward on. The global random state is left as it was found.
"""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Case", "zoo"]

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Pair = namedtuple("Pair", ["hidden", "extra"])


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One awkward model.

    Attributes:
        id: what is awkward about it.
        build: makes model, args and kwargs from torch's global random state.
        has_grad: backward can be called on the loss.
    """

    id: str
    build: Callable[[], Any]
    has_grad: bool = True

    def make(self, seed: int = 0) -> Made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.build()
        model, args, kwargs = (*made, {}) if len(made) == 2 else made
        return model.train(), args, kwargs

    @staticmethod
    def loss(output: Any) -> Tensor:
        """Return a scalar that depends on every floating tensor of an output."""
        total = torch.zeros(())
        for tensor in tensors(output):
            if tensor.is_complex():
                tensor = torch.view_as_real(tensor)
            if tensor.is_floating_point():
                total = total + tensor.float().pow(2).sum() + tensor.float().sum()
        return total


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of an output, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    elif hasattr(tree, "__dataclass_fields__"):
        tree = list(vars(tree).values())
    if isinstance(tree, (tuple, list)):
        return [t for item in tree for t in tensors(item)]
    return []


class Fn(nn.Module):
    """A module made of named children and a function of (self, *args)."""

    def __init__(self, fn: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(self, *args, **kwargs)


def _mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3))


def _x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6)))


def _residual_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y += self.b(x).relu()
    return self.c(y)


def _tied() -> Made:
    model = Fn(lambda s, i: s.head(torch.tanh(s.embedding(i))), embedding=nn.Embedding(10, 6), head=nn.Linear(6, 10))
    model.head.weight = model.embedding.weight
    return model, (torch.randint(10, (4, 5)),), {}


def _shared() -> Made:
    layer = nn.Linear(6, 6)
    return nn.Sequential(OrderedDict(a=layer, act=nn.Tanh(), b=layer)), (_x(),), {}


def _frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def _checkpointed(use_reentrant: bool) -> Made:
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.head(checkpoint(s.block, s.stem(x), use_reentrant=use_reentrant))

    return Fn(forward, stem=nn.Linear(6, 6), block=block, head=nn.Linear(6, 3)), (_x(),), {}


def _checkpointed_dropout() -> Made:
    block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.GELU())
    return Fn(lambda s, x: s.head(checkpoint(s.block, x, use_reentrant=False)), block=block, head=nn.Linear(6, 3)), (
        _x(),
    )


def _lazy() -> Made:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    x = _x()
    model(x)
    return model, (x,), {}


def _weight_norm_old() -> Made:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3)), (_x(),), {}


def _pruned() -> Made:
    from torch.nn.utils import prune

    model = _mlp(nn.ReLU())
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model, (_x(),), {}


def _no_grad_part(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = s.backbone(x)
    return s.head(features)


def _branching(s: Any, x: Tensor, *, flag: bool = False) -> Tensor:
    return s.never(x) if flag else s.always(x)


def _chunks(s: Any, x: Tensor) -> tuple[Tensor, ...]:
    return s.a(x).chunk(2, dim=-1)


def _chunked() -> Made:
    inner = Fn(_chunks, a=nn.Linear(6, 8))
    return Fn(lambda s, x: s.b(torch.cat([h * 2 for h in s.inner(x)], -1)), inner=inner, b=nn.Linear(8, 3)), (_x(),), {}


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.ones(6))})
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = self.act(x @ weight)
        return x * self.named["scale"]


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(6, 6), "act": nn.ReLU()}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["act"](block["lin"](x))
        return x


def _containers() -> list[Case]:
    def wrap(give: Callable[[Tensor], Any], use: Callable[[Any], Tensor]) -> Callable[[], Any]:
        def build() -> Any:
            inner = Fn(lambda s, x: give(s.lin(x)), lin=nn.Linear(6, 8))
            return Fn(lambda s, x: s.head(use(s.inner(x))), inner=inner, head=nn.Linear(8, 3)), (_x(),)

        return build

    return [
        Case("tuple-output", wrap(lambda h: (h, h * 2), lambda o: o[0] + o[1])),
        Case("list-output", wrap(lambda h: [h, None, 3], lambda o: o[0])),
        Case("dict-output", wrap(lambda h: {"h": h, "deep": {"k": [h.tanh()]}}, lambda o: o["h"] + o["deep"]["k"][0])),
        Case("dataclass-output", wrap(lambda h: Output(h, [h.relu()]), lambda o: o.logits + o.hidden[0])),
        Case("namedtuple-output", wrap(lambda h: Pair(h, None), lambda o: o.hidden)),
        Case("unused-output", wrap(lambda h: (h, h.sin()), lambda o: o[0])),
        Case("same-tensor-twice-in-output", wrap(lambda h: {"a": h, "b": h}, lambda o: o["a"] * o["b"])),
        Case("top-level-dict", lambda: (Fn(lambda s, x: {"y": s.a(x), "n": 3}, a=nn.Linear(6, 3)), (_x(),))),
        Case(
            "top-level-dataclass", lambda: (Fn(lambda s, x: Output(s.a(x), [s.a(x * 2)]), a=nn.Linear(6, 3)), (_x(),))
        ),
    ]


def _none_output() -> Made:
    def keep(s: Any, x: Tensor) -> None:
        s.kept = s.lin(x)

    inner = Fn(keep, lin=nn.Linear(6, 8))
    inner.kept = None

    def forward(s: Any, x: Tensor) -> Tensor:
        s.inner(x)
        kept = s.inner.kept
        s.inner.kept = None
        return s.head(kept)

    return Fn(forward, inner=inner, head=nn.Linear(8, 3)), (_x(),), {}


def _in_place() -> list[Case]:
    abc = {"a": nn.Linear, "b": nn.Linear, "c": nn.Linear}
    return [
        Case("in-place-relu", lambda: (_mlp(nn.ReLU(inplace=True)), (_x(),))),
        Case("residual-in-place", lambda: (Fn(_residual_in_place, **{k: v(6, 6) for k, v in abc.items()}), (_x(),))),
        Case("in-place-dropout", lambda: (_mlp(nn.Dropout(0.5, inplace=True), nn.ReLU()), (_x(),))),
        Case(
            "in-place-on-a-view",
            lambda: (
                Fn(lambda s, x: s.b(s.a(x).view(2, 16).mul_(2).view(4, 8)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
                (_x(),),
            ),
        ),
        Case(
            "in-place-relu-after-batchnorm",
            lambda: (
                nn.Sequential(
                    nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
                ),
                (_x(4, 2, 6, 6),),
            ),
        ),
    ]


def _sharing() -> list[Case]:
    def twice() -> Any:
        return Fn(lambda s, x: s.a(torch.tanh(s.a(x))), a=nn.Linear(6, 6)), (_x(),)

    return [
        Case("tied-weights", _tied),
        Case("shared-module", _shared),
        Case("module-called-twice", twice),
        Case("identity", lambda: (_mlp(nn.Identity(), nn.Identity()), (_x(),))),
        Case("returns-its-input", lambda: (_mlp(Fn(lambda s, x: x)), (_x(),))),
        Case("eval-dropout", lambda: (_mlp(nn.Dropout(0.0)), (_x(),))),
        Case("parameter-lists", lambda: (_Parameters(), (_x(),))),
        Case("nested-containers", lambda: (_Nested(), (_x(),))),
        Case("functional-weight", lambda: (Fn(lambda s, x: F.linear(x, s.a.weight).sin(), a=nn.Linear(6, 3)), (_x(),))),
        Case(
            "returns-a-parameter", lambda: (Fn(lambda s, x: s.b(x + s.p(x)), p=_Position(), b=nn.Linear(6, 3)), (_x(),))
        ),
    ]


class _Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def _frozen_parts() -> list[Case]:
    def fully_frozen() -> Any:
        return _frozen(_mlp(nn.ReLU()), ""), (_x(),)

    return [
        Case("frozen-first-layer", lambda: (_frozen(_mlp(nn.ReLU()), "0"), (_x(),))),
        Case("frozen-last-layer", lambda: (_frozen(_mlp(nn.ReLU()), "2"), (_x(),))),
        Case("fully-frozen", fully_frozen, has_grad=False),
        Case("no-grad-part", lambda: (Fn(_no_grad_part, backbone=nn.Linear(6, 8), head=nn.Linear(8, 3)), (_x(),))),
        Case(
            "detach",
            lambda: (
                Fn(lambda s, x: s.b(s.a(x).detach()) + s.c(x), a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 3)),
                (_x(),),
            ),
        ),
        Case("branch-never-called", lambda: (Fn(_branching, always=nn.Linear(6, 3), never=nn.Linear(6, 3)), (_x(),))),
        Case("no-parameters", lambda: (nn.Sequential(nn.ReLU(), nn.Flatten()), (_x().requires_grad_(),))),
        Case("input-needs-gradient", lambda: (_mlp(nn.ReLU()), (_x().requires_grad_(),))),
    ]


def _recurrent() -> list[Case]:
    return [
        Case(
            "lstm",
            lambda: (Fn(lambda s, x: s.head(s.rnn(x)[0]), rnn=nn.LSTM(6, 5), head=nn.Linear(5, 3)), (_x(7, 4, 6),)),
        ),
        Case(
            "lstm-state-only",
            lambda: (Fn(lambda s, x: s.head(s.rnn(x)[1][0]), rnn=nn.LSTM(6, 5), head=nn.Linear(5, 3)), (_x(7, 4, 6),)),
        ),
        Case(
            "gru",
            lambda: (Fn(lambda s, x: s.head(s.rnn(x)[1]), rnn=nn.GRU(6, 5), head=nn.Linear(5, 3)), (_x(7, 4, 6),)),
        ),
        Case(
            "attention-x-x-x",
            lambda: (Fn(lambda s, x: s.attn(x, x, x)[0], attn=nn.MultiheadAttention(6, 2)), (_x(5, 4, 6),)),
        ),
        Case(
            "transformer-layer",
            lambda: (nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, batch_first=True), (_x(4, 5, 6),)),
        ),
        Case(
            "sparse-embedding",
            lambda: (
                Fn(lambda s, i: s.head(s.emb(i)), emb=nn.Embedding(20, 6, sparse=True), head=nn.Linear(6, 3)),
                (torch.randint(20, (4, 5)),),
            ),
        ),
        Case(
            "embedding-bag",
            lambda: (
                Fn(lambda s, i: s.head(s.emb(i)), emb=nn.EmbeddingBag(20, 6), head=nn.Linear(6, 3)),
                (torch.randint(20, (4, 5)),),
            ),
        ),
    ]


def _wrapped() -> list[Case]:
    from torch.nn.utils import parametrizations

    def spectral() -> Any:
        return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), (_x(),)

    def weight_norm() -> Any:
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), (_x(),)

    return [
        Case("checkpoint-reentrant", lambda: _checkpointed(True)),
        Case("checkpoint-non-reentrant", lambda: _checkpointed(False)),
        Case("checkpoint-dropout", _checkpointed_dropout),
        Case("lazy", _lazy),
        Case("weight-norm-old", _weight_norm_old),
        Case("weight-norm", weight_norm),
        Case("spectral-norm", spectral),
        Case("pruned", _pruned),
        Case("custom-function", lambda: (_mlp(Fn(lambda s, x: _Double.apply(x))), (_x(),))),
        Case(
            "keyword-only",
            lambda: (
                Fn(lambda s, *, x, y: s.a(x) * s.b(input=y), a=nn.Linear(6, 3), b=nn.Linear(6, 3)),
                (),
                {"x": _x(), "y": _x()},
            ),
        ),
        Case("none-output", _none_output),
    ]


def _numbers() -> list[Case]:
    return [
        Case("bfloat16", lambda: (_mlp(nn.ReLU()).bfloat16(), (_x().bfloat16(),))),
        Case("float16", lambda: (_mlp(nn.ReLU()).half(), (_x().half(),))),
        Case("float64", lambda: (_mlp(nn.Sigmoid()).double(), (_x().double(),))),
        Case(
            "complex",
            lambda: (
                Fn(lambda s, x: s.a(x), a=nn.Linear(6, 3, dtype=torch.complex64)),
                (torch.randn(4, 6, dtype=torch.complex64),),
            ),
        ),
        Case("empty-batch", lambda: (_mlp(nn.ReLU()), (_x(0, 6),))),
        Case("batch-of-one", lambda: (_mlp(nn.ReLU()), (_x(1, 6),))),
        Case("zero-dim-output", lambda: (Fn(lambda s, x: s.a(x).mean(), a=nn.Linear(6, 3)), (_x(),))),
        Case(
            "channels-last",
            lambda: (
                nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last),
                (_x(2, 3, 6, 6).to(memory_format=torch.channels_last),),
            ),
        ),
        Case(
            "batchnorm",
            lambda: (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()), (_x(4, 2, 8),)),
        ),
        Case("expanded-output", lambda: (_mlp(Fn(lambda s, x: x[:1].expand(4, 8))), (_x(),))),
    ]


def zoo() -> list[Case]:
    """Return all cases; their ids are unique."""
    groups = (_containers, _in_place, _sharing, _frozen_parts, _recurrent, _wrapped, _numbers)
    return [case for group in groups for case in group()]
