"""Gradients and outputs of any layout, dtype and kind, through a whole watched step: right, or one of them refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gradwatch import Watch
from gradwatch.treatments import ClipByGlobalNorm, ClipByValue

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensor|.*[Ss]parse|.*quantize")


class Tagged(Tensor):
    """A tensor with a name of its own."""


def made_without_autograd(n: int) -> Tensor:
    with torch.inference_mode():
        return torch.randn(n)


def uncoalesced(n: int) -> Tensor:
    index = torch.arange(0, n, 3)
    index = torch.cat([index, index])[None]
    return torch.sparse_coo_tensor(index, torch.randn(index.shape[1]), (n,), check_invariants=True)


GRADIENTS = {
    "column": lambda n: torch.stack([torch.randn(n), torch.full((n,), 1e3)], dim=1)[:, 0],
    "expanded": lambda n: torch.tensor(2.0).expand(n),
    "negated": lambda n: torch._neg_view(torch.randn(n)),
    "negated-column": lambda n: torch._neg_view(torch.randn(n, 2))[:, 0],
    "imaginary-part": lambda n: torch.randn(n, dtype=torch.complex64).conj().imag,
    "zeros-without-memory": lambda n: torch._efficientzerotensor((n,)),
    "windows": lambda n: torch.randn(2 * n).as_strided((n,), (2,)),
    "sparse": uncoalesced,
    "inference": made_without_autograd,
    "subclass": lambda n: torch.randn(n).as_subclass(Tagged),
}
SIZES = [50, 300_000]


def plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_nested:
        tensor = torch.cat([row.reshape(-1) for row in tensor.unbind()])
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.as_subclass(Tensor)
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.clone().double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "treatment", [None, ClipByGlobalNorm(0.5), ClipByValue(0.5)], ids=["observed", "norm", "value"]
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_of_any_kind_is_measured_and_treated_right(name: str, treatment, size: int) -> None:
    model = nn.Module()
    model.odd, model.usual = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    grad = GRADIENTS[name](size)
    expected = plain(grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything = {"activations_every": 1, "histograms_every": 1, "updates_every": 1}
        treatments = [] if treatment is None else [treatment]
        with Watch(model, optimizer, rules="observe", treatments=treatments, on_error="raise", **everything) as watch:
            model.odd.grad, model.usual.grad = grad, torch.zeros(5)
            watch.step(loss=1.0)
    record = watch.history[-1]
    norm, zeros = expected.norm().item(), (expected == 0).double().mean().item()
    assert record.global_norm == pytest.approx(norm, rel=1e-6)
    assert record["grad_norm", "odd"] == pytest.approx(norm, rel=1e-6)
    assert record["grad_absmax", "odd"] == pytest.approx(expected.abs().max().item(), rel=1e-6)
    assert record["zero_fraction", "odd"] == pytest.approx(zeros, rel=1e-6)
    assert record.histograms["odd"].counts.sum() == size
    if isinstance(treatment, ClipByGlobalNorm) and norm:
        expected = expected * min(1.0, 0.5 / norm)
    elif isinstance(treatment, ClipByValue):
        expected = expected.clamp(-0.5, 0.5)
    torch.testing.assert_close(model.odd.detach().double(), -expected, rtol=1e-5, atol=1e-7)
    assert record["update_norm", "odd"] == pytest.approx(expected.norm().item(), rel=1e-5)


class Sealed(Tensor):
    """A wrapper that works, and gives nobody what it holds."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Sealed":
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: x.held, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


class Descent(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= p.grad.held if type(p.grad) is Sealed else p.grad


@pytest.mark.parametrize("sealed", [("a",), ("a", "b")], ids=["one", "all"])
@pytest.mark.parametrize("rules", ["default", "autoclip"])
def test_a_gradient_that_nobody_can_read_is_left_out_by_itself_and_called_neither_dead_nor_healthy(
    rules: str, sealed: tuple[str, ...]
) -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    optimizer = Descent(model.parameters(), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Watch(model, optimizer, rules=rules, on_error="raise") as watch:
            for step in range(30):
                for name, p in model.named_parameters():
                    grad = torch.full((4, 4), 0.5)
                    p.grad = Sealed(grad) if name in sealed else grad
                watch.step(loss=3.0 - step / 20)
    record = watch.history[-1]
    assert [i.rule for i in watch.incidents] == []
    assert set(record.unseen) - {""} == set(sealed)
    assert ("" in record.unseen) == (len(sealed) == 2)
    assert all("Sealed keeps its elements" in why for why in record.unseen.values())
    assert len(sealed) == 2 or (record.global_norm, record["grad_norm", "b"]) == (2.0, 2.0)
    assert (model.a == -15).all()
    assert (model.b == -15).all()


def test_one_gradient_shared_by_two_parameters_is_scaled_once_for_each() -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with Watch(model, optimizer, rules="observe", treatments=[ClipByGlobalNorm(1.0)]) as watch:
        model.a.grad = model.b.grad = torch.ones(4)
        watch.step(loss=1.0)
    assert model.a.tolist() == model.b.tolist() == [pytest.approx(-1 / math.sqrt(8))] * 4


def test_observing_leaves_an_expanded_gradient_in_its_place() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(4))
    grad = torch.ones(()).expand(4)
    with Watch(model, torch.optim.SGD(model.parameters(), 1.0), rules="default") as watch:
        model.a.grad = grad
        watch.step(loss=1.0)
        assert model.a.grad is grad


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
def test_the_share_of_zeros_in_a_gradient_is_one_of_all_its_real_numbers(
    dtype: torch.dtype, layout: torch.layout
) -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(8, dtype=dtype))
    grad = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2], dtype=dtype)
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), rules="observe", histograms_every=1) as watch:
        model.a.grad = grad if layout is torch.strided else grad.to_sparse()
        watch.step(loss=1.0)
    zeros = 14 / 16 if dtype.is_complex else 6 / 8
    assert watch.history[-1]["zero_fraction", "a"] == zeros


OUTPUTS = {
    "column": lambda h: h[:, 0],
    "expanded": lambda h: h.mean().expand(300, 7),
    "transposed": lambda h: h.t(),
    "negated": lambda h: torch._neg_view(h.detach()),
    "conjugate": lambda h: torch.complex(h, h * 2).conj(),
    "imaginary-part": lambda h: torch.complex(h, h * 2).conj().imag,
    "scalar": lambda h: h.sum(),
    "channels-last": lambda h: h[:, :, None, None].expand(-1, -1, 3, 3).contiguous(memory_format=torch.channels_last),
    "sliced": lambda h: h[::2, 1:3],
    "windows": lambda h: h.unfold(1, 2, 1),
    "subclass": lambda h: h.as_subclass(Tagged),
    "float16": lambda h: h.half(),
    "bfloat16": lambda h: h.bfloat16(),
    "float64": lambda h: h.double(),
    "float8": lambda h: h.detach().to(torch.float8_e5m2),
    "zeros-without-memory": lambda h: torch._efficientzerotensor(h.shape),
    "coo": lambda h: h.detach().relu().to_sparse(),
    "csr": lambda h: h.detach().relu().to_sparse_csr(),
    "csc": lambda h: h.detach().relu().to_sparse_csc(),
    "bsr": lambda h: h.detach().relu().to_sparse_bsr((2, 2)),
    "nested": lambda h: torch.nested.nested_tensor([h.detach()[:3], h.detach()[3:]]),
    "jagged": lambda h: torch.nested.nested_tensor([h.detach()[:3], h.detach()[3:]], layout=torch.jagged),
}


class Gives(nn.Module):
    """Hands on what a function makes of its input."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, h: Tensor) -> Tensor:
        self.last = self.make(h)
        return self.last


class Net(nn.Module):
    """A layer, and beside it one whose output is odd."""

    def __init__(self, make) -> None:
        super().__init__()
        self.layer, self.odd = nn.Linear(8, 4), Gives(make)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        odd = self.odd(h)
        goes_on = odd.requires_grad and odd.layout is torch.strided
        return h.square().mean() + (odd.abs().double().sum() if goes_on else 0)


@pytest.mark.parametrize("batch", [20, 20_000])
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_of_any_kind_is_measured_right(name: str, batch: int) -> None:
    torch.manual_seed(0)
    net = Net(OUTPUTS[name])
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    with Watch(net, optimizer, rules="observe", activations_every=1, on_error="raise") as watch:
        loss = net(torch.randn(batch, 8))
        loss.backward()
        watch.step(loss=loss)
    record, elements = watch.history[-1], plain(net.odd.last)
    assert not [note for note in watch.session.notes if "measured" in note]
    assert record["output_rms", "odd"] == pytest.approx(elements.square().mean().sqrt().item(), rel=1e-5)
    assert record["output_absmax", "odd"] == pytest.approx(elements.abs().max().item(), rel=1e-6)
    assert record["output_zero_fraction", "odd"] == pytest.approx((elements == 0).double().mean().item(), rel=1e-6)
    assert record["output_nonfinite", "odd"] == 0
    np.testing.assert_allclose(record["output_mean", "odd"], elements.mean().item(), rtol=1e-4, atol=1e-6)


class Gains(nn.Module):
    """Hands an odd tensor from one layer to another, gradient and all."""

    def __init__(self, make) -> None:
        super().__init__()
        self.layer, self.odd, self.after = nn.Linear(8, 4), Gives(make), Gives(lambda t: t)

    def forward(self, x: Tensor) -> Tensor:
        odd = self.after(self.odd(self.layer(x)))
        dense = torch.nested.to_padded_tensor(odd, 0.0) if odd.is_nested else odd.to_dense()
        return dense.square().sum()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda h: h.to_sparse(), id="coo"),
        pytest.param(lambda h: torch.nested.as_nested_tensor([h[:3], h[3:]]), id="nested"),
    ],
)
def test_full_hooks_keep_off_modules_whose_tensors_have_no_views(make) -> None:
    net = Gains(make)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with Watch(net, optimizer, rules="observe", activations_every=1, backward="full", on_error="raise") as watch:
        for _ in range(3):
            loss = net(torch.ones(20, 8))
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    (note,) = [note for note in watch.session.notes if "no plain tensor" in note]
    assert note.startswith("odd, after: gradient from a tensor hook, not a full one")


def test_an_output_that_nothing_can_read_is_refused_by_name_and_alone() -> None:
    net = Net(lambda h: torch.zeros(4, dtype=torch.float4_e2m1fn_x2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with Watch(net, optimizer, rules="default", activations_every=1, on_error="raise") as watch:
        loss = net(torch.randn(20, 8))
        loss.backward()
        watch.step(loss=loss)
    (note,) = [note for note in watch.session.notes if "measured" in note]
    assert note.startswith("odd: output could not be measured: UnreadableError: a Tensor of torch.float4_e2m1fn_x2")
    assert record_of(watch, "layer") > 0
    assert math.isnan(record_of(watch, "odd"))


def record_of(watch: Watch, path: str) -> float:
    record = watch.history[-1]
    return float(record.columns["output_rms"][record.index.paths.index(path)])
