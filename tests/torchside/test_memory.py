"""Addresses leave torch by one door, which gives dense memory or refuses."""

import ast
import weakref
from array import array
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import gradwatch
from gradwatch.errors import UnreadableError
from gradwatch.torchside import Lender, SameKind, lend, lend_at_once, owned, stamps_of, values, writable

CPU = torch.device("cpu")


def test_addresses_are_asked_for_in_one_file() -> None:
    root = Path(gradwatch.__file__).parent
    askers = {
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert askers == {"torchside/_memory.py"}


def read(tensor: torch.Tensor) -> list[float]:
    import ctypes

    loan = lend([tensor], dtype=torch.float32, device=CPU)
    return list((ctypes.c_float * int(loan.numels[0])).from_address(int(loan.addresses[0])))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: x, id="dense"),
        pytest.param(lambda x: x[:, 1], id="column"),
        pytest.param(lambda x: x[0, 0].expand(7), id="expanded"),
        pytest.param(lambda x: x[0, :1].expand(3, 1), id="a-row-repeated"),
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[::2, 1:3], id="window"),
        pytest.param(lambda x: torch._neg_view(x), id="negated"),
        pytest.param(lambda x: torch._neg_view(x)[:, 1], id="negated-column"),
        pytest.param(lambda x: torch._efficientzerotensor((3,)), id="zeros-without-memory"),
        pytest.param(lambda x: x.flatten().unfold(0, 3, 1), id="overlapping-windows"),
        pytest.param(lambda x: x.to(torch.complex64).conj().imag, id="imaginary-part-of-a-conjugate"),
    ],
)
def test_what_is_lent_holds_the_elements_in_a_row(make) -> None:
    tensor = make(torch.arange(12.0).view(4, 3) + 1)
    assert sorted(read(tensor)) == sorted(tensor.clone().flatten().tolist())


def freed() -> torch.Tensor:
    tensor = torch.ones(10)
    tensor.untyped_storage().resize_(0)
    return tensor


def shortened() -> torch.Tensor:
    tensor = torch.ones(10)
    tensor.untyped_storage().resize_(16)
    return tensor


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: torch.ones(3, dtype=torch.float64),
            "a kernel for torch.float32 on cpu was given torch.float64 on cpu",
        ),
        (lambda: torch.ones(3, device="meta"), "a kernel for torch.float32 on cpu was given torch.float32 on meta"),
        (lambda: torch.eye(3).to_sparse(), "a Tensor of layout torch.sparse_coo has no memory of its own in a row"),
        (freed, "a tensor of 10 elements whose memory was given back"),
        (shortened, "a tensor of 10 elements whose memory was given back"),
    ],
    ids=["dtype", "device", "sparse", "freed", "shortened"],
)
def test_memory_that_is_not_there_is_refused_by_name(make, says: str) -> None:
    with pytest.raises(UnreadableError) as error:
        lend([make()], dtype=torch.float32, device=CPU)
    assert str(error.value) == says


def test_memory_to_be_written_is_never_a_copy() -> None:
    with pytest.raises(UnreadableError, match="can't be written to"):
        lend([torch.ones(4, 2)[:, 0]], dtype=torch.float32, device=CPU, copy=False)


def test_a_kind_that_keeps_its_elements_to_itself_is_refused_by_name() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3)
    with pytest.raises(UnreadableError, match="FakeTensor"):
        values(fake)
    with pytest.raises(UnreadableError, match="float4"):
        values(torch.zeros(4, dtype=torch.float4_e2m1fn_x2))


def test_arithmetic_in_place_reaches_every_element_once() -> None:
    stretched = torch.ones(1, 3).expand(5, 3)
    writable(stretched).mul_(0.5)
    assert stretched.tolist() == [[0.5] * 3] * 5
    windows = torch.arange(6.0).unfold(0, 3, 1)
    with pytest.raises(UnreadableError, match="lie on one another"):
        writable(windows)


@pytest.mark.parametrize(
    ("make", "is_copied"),
    [
        (lambda: torch.ones(4, 2)[:, 0], False),
        (lambda: torch.ones(2, 3).t(), False),
        (lambda: torch.ones(()).expand(4), True),
        (lambda: torch.arange(6.0).unfold(0, 3, 1), True),
        (lambda: torch._efficientzerotensor((3,)), True),
    ],
    ids=["column", "transposed", "expanded", "windows", "zero-tensor"],
)
def test_a_tensor_gives_way_to_a_copy_only_where_it_can_not_be_written(make, is_copied: bool) -> None:
    tensor = make()
    mine = owned(tensor)
    assert (mine is not tensor) is is_copied
    assert torch.equal(mine, tensor)
    assert mine.mul_(2).tolist() == (make().clone() * 2).tolist()


def gradients() -> list[torch.Tensor]:
    return [torch.randn(4, 4), torch.randn(16), torch.randn(2, 8), torch.randn(16), torch.randn(16)]


def in_one_block() -> list[torch.Tensor]:
    return list(torch.randn(80).split(16))


ODD = {
    "other-tensors": lambda g: g,
    "shorter": lambda g: g[:8],
    "double": lambda g: g.double(),
    "expanded": lambda g: g.flatten()[:1].expand(16),
    "every-other": lambda g: torch.randn(32)[::2],
    "part-of-something-larger": lambda g: torch.randn(48)[16:32],
    "negated": lambda g: torch._neg_view(g),
    "zeros-without-memory": lambda g: torch._efficientzerotensor((16,)),
    "empty": lambda g: g[:0],
    "meta": lambda g: g.to("meta"),
    "sparse": lambda g: g.to_sparse(),
    "a-class-of-its-own": lambda g: g.as_subclass(type("Mine", (torch.Tensor,), {})),
    "freed": lambda g: _resized(g.clone(), 0),
    "cut-short": lambda g: _resized(g.clone(), 20),
    "with-a-graph": lambda g: g.clone().requires_grad_() * 1,
}


def _resized(tensor: torch.Tensor, size: int) -> torch.Tensor:
    tensor.untyped_storage().resize_(size)
    return tensor


@pytest.mark.parametrize("which", [0, 3, 4])
@pytest.mark.parametrize("make", [gradients, in_one_block])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_gradients_that_are_known_again_are_lent_as_those_that_are_seen_first(make, odd, which: int) -> None:
    lender = Lender(array("q", [16] * 5))
    for change in (None, None, odd, odd, None, None, odd, None):
        tensors = make()
        if change is not None:
            tensors[which] = change(tensors[which].flatten())
        dtype = tensors[0].dtype
        numels = array("q", map(torch.Tensor.numel, tensors))
        assert lender.lend(tensors) == lend_at_once(tensors, dtype=dtype, numels=numels)


def test_a_block_is_lent_only_where_all_lie_in_it() -> None:
    lender = Lender(array("q", [16] * 5))
    assert lender.lend(in_one_block()) is not None
    tensors = in_one_block()
    gone = torch.randn(32)[16:]
    gone.untyped_storage().resize_(0)
    for place in range(1, 5):
        assert lender.lend([*tensors[:place], gone, *tensors[place + 1 :]]) is None


ALTERED = {
    "frozen": lambda p: p.requires_grad_(False),
    "larger": lambda p: setattr(p, "data", torch.randn(5, 4)),
    "half": lambda p: setattr(p, "data", p.data.half()),
    "transposed": lambda p: setattr(p, "data", p.data.t()),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_a_kind_is_known_again_until_something_of_it_is_another(alter) -> None:
    params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(6)]
    kind = SameKind()
    assert not kind.holds(params)
    if not kind.learn(params):
        pytest.skip("this torch has nothing to ask with")
    assert kind.holds(params)
    with torch.no_grad():
        params[1].mul_(2)
    assert kind.holds(params)
    assert not kind.holds(params[:5])
    alter(params[3])
    assert not kind.holds(params)
    assert kind.learn(params)
    assert kind.holds(params)


def test_a_kind_that_could_not_be_learnt_is_not_held_to_be_the_one_before() -> None:
    params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(6)]
    kind = SameKind()
    for step in range(40):
        params[2].requires_grad_(step % 2 == 0)
        assert not kind.holds(params)
        kind.learn(params)


def test_a_kind_keeps_no_tensor() -> None:
    params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(6)]
    kind = SameKind()
    kind.holds(params)
    kind.learn(params)
    gone = weakref.ref(params[0])
    del params
    assert gone() is None


WRITES = {
    "another value": lambda d: d.update(a=object()),
    "one more": lambda d: d.update(z=1),
    "one less": lambda d: d.pop("a"),
    "taken out and put back": lambda d: d.update(a=d.pop("a")),
    "cleared": lambda d: d.clear(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_dictionary_that_was_written_to_has_another_stamp(kind, write) -> None:
    dicts = [kind(a=1, b=2), kind(), kind(a=1, b=2)]
    stamps = stamps_of(dicts)
    if stamps is None:
        pytest.skip("this interpreter keeps no count")
    assert stamps_of(dicts) == stamps
    assert len({*stamps}) == 3
    write(dicts[2])
    assert stamps_of(dicts)[:2] == stamps[:2]
    assert stamps_of(dicts)[2] != stamps[2]
    assert stamps_of([kind(a=1, b=2)])[0] not in stamps


def test_what_is_no_dictionary_has_no_stamp() -> None:
    assert stamps_of([{}, None]) is None
