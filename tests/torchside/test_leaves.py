"""The one walker: finds tensors wherever users put them, runs none of their code, and never raises."""

import dataclasses
import io
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.torchside import find, map_tensors, tensors_of

X, Y = torch.ones(4, 3), torch.zeros(4)
Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Late:
    x: torch.Tensor
    cache: object = dataclasses.field(init=False, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: torch.Tensor
    late: object = dataclasses.field(init=False)


@dataclasses.dataclass
class Broken:
    x: torch.Tensor

    @property
    def y(self):
        raise OSError("gone")

    def __getattr__(self, name):
        raise RuntimeError(name)


class Plain:
    def __init__(self, **held):
        self.__dict__.update(held)


class Slots:
    __slots__ = ("never", "x")

    def __init__(self, x):
        self.x = x


class Thorny:
    """Whatever is asked of it raises."""

    def __init__(self, **held):
        object.__getattribute__(self, "__dict__").update(held)

    def __getattribute__(self, name):
        raise RuntimeError("hands off")

    __iter__ = __len__ = __bool__ = __eq__ = __hash__ = __repr__ = __contains__ = __getattribute__


class OwnMapping(Mapping):
    def __init__(self, held):
        self._held = held

    def __getitem__(self, key):
        raise OSError("a look at an entry costs a download")

    __iter__ = __len__ = keys = __getitem__


class ThornyDict(dict):
    def __getitem__(self, key):
        raise RuntimeError("no")

    __iter__ = __len__ = keys = items = values = __contains__ = get = __getitem__


class ThornyList(list):
    def __iter__(self):
        raise RuntimeError("no")

    __len__ = __getitem__ = __iter__


def names(tree, **options):
    return [name for name, _ in tensors_of(tree, **options)]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        pytest.param(X, [""], id="tensor"),
        pytest.param((X, [Y, 3, "text"]), ["0", "1.0"], id="tuple-and-list"),
        pytest.param(Pair(X, Y), ["0", "1"], id="namedtuple"),
        pytest.param({"a": X, "b": {"c": Y, "d": 1.0}}, ["a", "b.c"], id="dict"),
        pytest.param(OrderedDict(a=X), ["a"], id="ordered-dict"),
        pytest.param(defaultdict(list, a=X), ["a"], id="defaultdict"),
        pytest.param(UserDict(a=X, b=Y), ["a", "b"], id="user-dict"),
        pytest.param(UserList([X, Y]), ["0", "1"], id="user-list"),
        pytest.param(MappingProxyType({"a": X}), ["a"], id="mapping-proxy"),
        pytest.param(ChainMap({"a": X}, {"a": Y, "b": Y}), ["a", "b"], id="chain-map"),
        pytest.param(deque([X, Y]), ["0", "1"], id="deque"),
        pytest.param({X}, ["0"], id="set"),
        pytest.param(frozenset([X]), ["0"], id="frozenset"),
        pytest.param(Late(X), ["x"], id="dataclass-with-an-unset-field"),
        pytest.param(Slotted(X), ["x"], id="frozen-dataclass-with-slots"),
        pytest.param(Broken(X), ["x"], id="dataclass-that-raises-on-access"),
        pytest.param(OwnMapping({"a": X}), ["a"], id="mapping-that-raises"),
        pytest.param(ThornyDict(a=X), ["a"], id="dict-that-raises"),
        pytest.param(ThornyList([X]), ["0"], id="list-that-raises"),
        pytest.param(pack_sequence([X]), ["0", "1"], id="packed-sequence"),
        pytest.param(np.ones(3), [], id="array"),
        pytest.param("text", [], id="text"),
        pytest.param(None, [], id="nothing"),
    ],
)
def test_tensors_are_found_in_containers_under_their_names(tree, expected):
    assert names(tree) == expected
    assert names(tree, objects=True) == expected


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        pytest.param(Plain(x=X, y=[Y]), ["x", "y.0"], id="attributes"),
        pytest.param(Slots(X), ["x"], id="slots"),
        pytest.param(Plain(_store=Plain(_mapping={"x": X})), ["_store._mapping.x"], id="graph-like"),
        pytest.param(torch.distributions.Normal(Y, Y + 1), ["loc", "scale"], id="distribution"),
    ],
)
def test_other_objects_are_opened_only_where_asked_for(tree, expected):
    assert names(tree) == []
    assert names(tree, objects=True) == expected


def test_an_object_that_raises_whatever_is_asked_of_it_is_read():
    assert names(Thorny(x=X), objects=True) == ["x"]


def test_no_property_is_computed_and_nothing_of_the_class_is_called():
    called = []

    class Lazy:
        def __init__(self):
            self.x = X

        @property
        def noise(self):
            called.append("noise")
            return torch.randn(3)

        def __getattr__(self, name):
            called.append(name)
            return torch.randn(3)

    state = torch.get_rng_state()
    assert names(Lazy(), objects=True) == ["x"]
    assert called == []
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_files_loaders_and_models_are_never_consumed_or_opened(tmp_path):
    generator = (x for x in [X, Y])
    iterator = iter([X, Y])
    file = io.StringIO("one\ntwo\n")
    loader = DataLoader(TensorDataset(X))
    tree = [generator, iterator, file, loader, nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(X)], lr=1.0), {"x": X}]
    assert names(tree, objects=True) == ["6.x"]
    assert len(list(generator)) == 2
    assert len(list(iterator)) == 2
    assert file.read() == "one\ntwo\n"


def test_cycles_and_deep_nests_end():
    ring = [X]
    ring.append({"again": ring})
    assert names(ring) == ["0"]
    me = SimpleNamespace(x=X)
    me.me = me
    parent = Plain(x=X)
    parent.parent = parent
    assert names(parent, objects=True) == ["x"]
    deep = [X]
    for _ in range(100_000):
        deep = [deep]
    assert names(deep) == []
    assert map_tensors(deep, lambda t, _: t + 1) is deep
    while deep[0] is not X:  # taken apart by hand: the interpreter would recurse
        deep = deep[0]


def test_a_tree_that_shares_itself_many_times_is_walked_in_bounded_time():
    tree = [3.0, []]
    for _ in range(64):
        tree = [tree, tree]
    assert names(tree) == []


@pytest.mark.filterwarnings("ignore")  # torch's own, of layouts in beta state
def test_nested_sparse_and_meta_tensors_are_leaves_like_any():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    tree = [nested, X.to_sparse(), X.to_sparse_csr(), X.to("meta"), torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)]
    assert names(tree) == ["0", "1", "2", "3", "4"]


def test_find_reads_an_entry_or_an_attribute_and_computes_none():
    class Output:
        def __init__(self):
            self.logits = X

        @property
        def loss(self):
            raise RuntimeError("computed")

    assert find({"a": Y, "logits": X}, "preds", "logits") is X
    assert find(Output(), "logits") is X
    assert find(Output(), "loss") is None
    assert find(X, "loss") is None


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param((X, [Y, 3]), id="tuple"),
        pytest.param(Pair(X, Y), id="namedtuple"),
        pytest.param({"a": X, 5: Y}, id="dict"),
        pytest.param(UserDict(a=X), id="user-dict"),
        pytest.param(UserList([X, 1]), id="user-list"),
        pytest.param(MappingProxyType({"a": X}), id="mapping-proxy"),
        pytest.param(deque([X]), id="deque"),
        pytest.param({X}, id="set"),
        pytest.param(Late(X), id="dataclass"),
        pytest.param(Slotted(X), id="frozen-slots"),
        pytest.param(OwnMapping({"a": X}), id="own-mapping"),
        pytest.param(pack_sequence([X]), id="packed"),
    ],
)
def test_replacing_tensors_makes_a_new_tree_and_leaves_the_given_one_as_it_was(tree):
    before = [t for _, t in tensors_of(tree)]
    new = map_tensors(tree, lambda t, _: t + 1 if t.is_floating_point() else None)
    assert type(new) is type(tree)
    assert all(a is b for a, (_, b) in zip(before, tensors_of(tree), strict=True))
    assert [
        bool((t == s + 1).all()) for (_, t), s in zip(tensors_of(new), before, strict=True) if s.is_floating_point()
    ]
    assert all(
        torch.equal(t, s + 1) for (_, t), s in zip(tensors_of(new), before, strict=True) if s.is_floating_point()
    )
    assert map_tensors(tree, lambda t, _: None) is tree
