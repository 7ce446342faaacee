"""Addresses leave torch by one door, which gives dense memory or refuses."""

import ast
from pathlib import Path

import pytest
import torch

import gradwatch
from gradwatch.errors import UnreadableError
from gradwatch.torchside import lend, owned, values, writable

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
