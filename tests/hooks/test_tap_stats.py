"""What a tap measures, against values that can be computed by hand or by autograd."""

import gc
import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.errors import ConfigError, UnknownNameError, UnknownPathError
from gradwatch.hooks import ModuleTap
from tests.zoo import Case, tensors, zoo

CASES = [pytest.param(case, id=case.id) for case in zoo()]


def columns_of(tap: ModuleTap, **settings):
    """Return columns as path -> value dicts, without what was not measured."""
    stats = tap.take()
    assert stats is not None
    columns, masks = stats.to_columns(stats.sums.numpy(), stats.maxima.numpy(), **settings)
    return {
        name: {p: float(v) for p, v, m in zip(stats.paths, column, masks[name], strict=True) if m}
        for name, column in columns.items()
    }


def tapped(model: nn.Module, **settings) -> ModuleTap:
    tap = ModuleTap(model, [n for n, _ in model.named_modules() if n], **settings)
    tap.arm()
    return tap


class Constant(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight + 0 * x


@pytest.mark.parametrize("backend", ["tensor", "full"])
def test_statistics_of_a_layer_that_can_be_computed_by_hand(backend: str) -> None:
    model = nn.Sequential(Constant(0.0, 1.0, -2.0, 3.0), nn.ReLU())
    x = torch.ones(4, requires_grad=True)
    tap = ModuleTap(model, ["0", "1"], backend=backend)
    for _ in range(2):
        tap.arm()
        (model(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        tap.disarm()
        found = columns_of(tap)
    assert found["output_mean"] == {"0": 0.5, "1": 1.0}
    assert found["output_rms"]["0"] == pytest.approx(math.sqrt(14 / 4))
    assert found["output_std"]["0"] == pytest.approx(math.sqrt(14 / 4 - 0.25))
    assert found["output_absmax"] == {"0": 3.0, "1": 3.0}
    assert found["output_zero_fraction"] == {"0": 0.25, "1": 0.5}
    assert found["output_nonfinite"] == {"0": 0.0, "1": 0.0}
    assert found["input_nonfinite"] == {"0": 0.0, "1": 0.0}
    assert found["grad_output_norm"]["1"] == pytest.approx(math.sqrt(30))
    assert found["grad_output_norm"]["0"] == pytest.approx(math.sqrt(4 + 16))
    assert found["grad_output_absmax"] == {"0": 4.0, "1": 4.0}
    assert found["grad_output_nonfinite"] == {"0": 0.0, "1": 0.0}
    assert "saturated_fraction" not in found
    assert "silent_fraction" not in found
    assert tap.coverage() == {}


def test_micro_batches_and_repeated_calls_add_up() -> None:
    layer = Constant(2.0)
    model = nn.ModuleList([layer])
    tap = tapped(model)
    for x in (torch.ones(1), torch.ones(3)):
        layer(x).sum().backward()
    layer(torch.ones(4)).sum().backward()
    found = columns_of(tap)
    assert found["output_rms"] == pytest.approx({"0": 2.0}, rel=1e-7)
    assert found["grad_output_norm"]["0"] == pytest.approx(math.sqrt(8))
    assert tap.take() is None


def test_gradients_are_divided_by_the_loss_scale() -> None:
    model = nn.Sequential(Constant(1.0))
    tap = tapped(model)
    (model(torch.ones(1)) * 1024.0).sum().backward()
    found = columns_of(tap, grad_scale=512.0)
    assert found["grad_output_norm"] == pytest.approx({"0": 2.0}, rel=1e-7)
    assert found["grad_output_absmax"] == {"0": 2.0}


def test_module_that_was_not_called_has_no_measurement() -> None:
    model = nn.ModuleDict({"used": Constant(1.0), "unused": Constant(1.0)})
    tap = tapped(model)
    model["used"](torch.ones(1)).sum().backward()
    assert set(columns_of(tap)["output_rms"]) == {"used"}
    assert tap.coverage() == {"unused": "not called while it was watched"}


def test_what_only_holds_others_is_not_missed() -> None:
    model = nn.ModuleDict({"list": nn.ModuleList([Constant(1.0)]), "dict": nn.ModuleDict({"one": Constant(1.0)})})
    tap = tapped(model)
    model["dict"]["one"](model["list"][0](torch.ones(1))).sum().backward()
    assert tap.coverage() == {}


def test_in_place_relu_is_read_before_and_after() -> None:
    model = nn.Sequential(Constant(-1.0, 1.0), nn.ReLU(inplace=True))
    tap = tapped(model)
    model(torch.ones(2)).sum().backward()
    found = columns_of(tap)
    assert found["output_zero_fraction"] == {"0": 0.0, "1": 0.5}
    assert found["grad_output_norm"] == {"0": 1.0, "1": pytest.approx(math.sqrt(2))}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_outputs_and_gradients_count_once(use_reentrant: bool) -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    x = torch.randn(4, 3, requires_grad=True)
    found = []
    for forward in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        tap = tapped(block)
        forward(x).sum().backward()
        tap.disarm()
        stats = tap.take()
        found.append((stats.sums, stats.maxima))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_first_module_with_a_non_finite_output_from_a_finite_input_is_told_apart(bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Constant(1.0, bad), nn.Linear(2, 2))
    tap = tapped(model)
    model(torch.ones(3, 2)).sum().backward()
    found = columns_of(tap)
    assert found["output_nonfinite"] == {"0": 0.0, "1": 3.0, "2": 6.0}
    assert found["input_nonfinite"] == {"0": 0.0, "1": 0.0, "2": 3.0}
    assert not math.isfinite(found["output_rms"]["1"])


def test_saturated_share_of_a_sigmoid_is_that_of_its_inputs() -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.ReLU())
    tap = tapped(model)
    model(torch.tensor([0.0, 4.9, 5.0, -7.0]))
    assert columns_of(tap)["saturated_fraction"] == {"0": 0.5}


@pytest.mark.parametrize(
    ("first", "x"),
    [
        pytest.param(nn.Linear(3, 3), torch.randn(64, 3), id="batch-of-vectors"),
        pytest.param(nn.Linear(3, 3), torch.randn(4, 16, 3), id="sequences"),
        pytest.param(nn.Conv2d(3, 3, 1), torch.randn(64, 3, 4, 4), id="images"),
        pytest.param(nn.Conv1d(3, 3, 1), torch.randn(64, 3, 4), id="signals"),
        pytest.param(nn.Linear(3, 3), torch.randn(4, 4, 4, 3), id="images-channels-last"),
    ],
)
def test_silent_units_are_reported_once_a_window_of_256_samples_is_complete(first: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        first.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    model = nn.Sequential(first, nn.ReLU())
    tap = ModuleTap(model, ["0", "1"])
    reported = []
    for _ in range(8):
        tap.arm()
        model(x)
        tap.disarm()
        reported.append(columns_of(tap).get("silent_fraction"))
    assert reported == [None, None, None, {"1": pytest.approx(2 / 3)}] * 2


def test_unit_that_was_active_once_in_the_window_is_not_silent() -> None:
    relu = nn.ReLU()
    tap = tapped(nn.Sequential(relu))
    x = -torch.ones(300, 2)
    x[17, 1] = 1.0
    relu(x)
    assert columns_of(tap)["silent_fraction"] == {"0": 0.5}


@pytest.mark.parametrize("case", [case for case in CASES if "checkpoint" not in case.id and case.values[0].has_grad])
def test_gradient_norms_equal_those_of_hooks_written_by_hand(case: Case) -> None:
    model, args, kwargs = case.make()
    squares: dict[str, float] = {}
    handles = []

    def remember(path, grad) -> None:
        if grad is not None and grad.numel():
            parts = torch.view_as_real(grad) if grad.is_complex() else grad
            squares[path] = squares.get(path, 0.0) + parts.double().square().sum().item()

    def on_forward(path, module, args, output) -> None:
        for t in {id(t): t for t in tensors(output) if t.requires_grad}.values():
            handles.append(t.register_hook(partial(remember, path)))

    paths = [path for path, _ in model.named_modules() if path]
    handles.extend(model.get_submodule(path).register_forward_hook(partial(on_forward, path)) for path in paths)
    torch.manual_seed(0)
    case.loss(model(*args, **kwargs)).backward()
    for handle in handles:
        handle.remove()

    model, args, kwargs = case.make()
    tap = tapped(model)
    torch.manual_seed(0)
    case.loss(model(*args, **kwargs)).backward()
    found = columns_of(tap).get("grad_output_norm", {}) if squares else {}
    assert found == {path: pytest.approx(math.sqrt(square), rel=1e-5, abs=1e-12) for path, square in squares.items()}


def test_forward_order_is_that_of_first_calls_containers_first() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(2, 2)
            self.early = nn.Sequential(nn.Linear(2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.late(self.early(x))

    model = Swapped()
    tap = tapped(model)
    model(torch.ones(1, 2))
    assert tap.forward_order == ["early", "early.0", "late"]


def test_graph_that_outlives_the_tap_reports_nothing_into_the_next_period() -> None:
    model = nn.Sequential(Constant(1.0))
    tap = tapped(model)
    old = model(torch.ones(1))
    tap.disarm()
    tap.take()
    old.sum().backward()
    assert tap.take() is None
    old = model(torch.ones(1))
    tap.arm()
    kept = model(torch.ones(1))
    tap.disarm()
    tap.arm()
    kept.sum().backward()
    assert "grad_output_norm" not in columns_of(tap)


def test_no_graph_or_output_is_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for backend in ("tensor", "full"):
        tap = ModuleTap(model, ["0", "1"], backend=backend)
        alive = []
        for _ in range(5):
            tap.arm()
            out = model(torch.ones(1, 2))
            out.sum().backward()
            alive.append(weakref.ref(out))
            tap.disarm()
        del out
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 0


def test_second_name_of_a_module_is_covered_by_the_first() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    tap = ModuleTap(model, ["a", "b"])
    tap.arm()
    layer(torch.ones(1, 2))
    assert tap.coverage() == {"b": "the same module as 'a', and counted there"}


def test_root_is_watched_only_when_named() -> None:
    model = nn.Linear(2, 2)
    tap = ModuleTap(model, [""])
    tap.arm()
    model(torch.ones(1, 2))
    assert set(columns_of(tap)["output_rms"]) == {""}


def test_full_backend_says_where_it_fell_back_and_why() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2))
    tap = ModuleTap(model, ["0", "1", "2", "3"], backend="full")
    for _ in range(2):
        tap.arm()
        model(torch.ones(3, 2)).sum().backward()
        tap.disarm()
    fell_back = "gradient from a tensor hook, not a full one: "
    assert tap.coverage() == {
        "0": fell_back + "no positional input needs a gradient",
        "1": fell_back + "an input or output of it is changed in place",
        "2": fell_back + "an input or output of it is changed in place",
    }


class Refusing(nn.Linear):
    def register_forward_hook(self, *args, **kwargs):
        raise RuntimeError("no hooks here")


def test_arming_registers_on_all_modules_or_on_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    tap = ModuleTap(model, ["0", "1"], backend="full")
    with pytest.raises(RuntimeError, match="no hooks here"):
        tap.arm()
    assert not tap.armed
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tensor_that_can_not_be_measured_is_named_and_training_goes_on() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(4, dtype=torch.float4_e2m1fn_x2)

    model = nn.Sequential(Strange())
    tap = tapped(model)
    model(torch.ones(2, 3))
    assert tap.coverage()["0"].startswith("output could not be measured: UnreadableError: a Tensor of torch.float4")


def test_closed_tap_can_not_be_armed_and_closing_twice_is_harmless() -> None:
    tap = tapped(nn.Sequential(nn.ReLU()))
    tap.close()
    tap.close()
    assert not tap.armed
    with pytest.raises(ConfigError, match="this ModuleTap was closed"):
        tap.arm()


def test_unknown_path_and_backend_are_refused_with_the_nearest() -> None:
    model = nn.ModuleDict({"encoder": nn.ReLU()})
    with pytest.raises(UnknownPathError, match=r"no module that matches 'encodr'.* Did you mean 'encoder'"):
        ModuleTap(model, ["encodr"])
    with pytest.raises(UnknownNameError, match=r"ModuleTap: there is no backend 'ful'. Did you mean 'full'"):
        ModuleTap(model, [], backend="ful")


def test_ranks_merge_by_sums_and_maxima() -> None:
    parts, whole = [], []
    data = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    for batches, into in (((data[:2], data[2:]), parts), ((data,), whole)):
        for batch in batches:
            tap = tapped(model)
            model(batch).sum().backward()
            tap.disarm()
            into.append(tap.take())
    sums = sum(p.sums.numpy() for p in parts)
    maxima = np.maximum(*(p.maxima.numpy() for p in parts))
    merged, _ = parts[0].to_columns(sums, maxima)
    expected, _ = whole[0].to_columns(whole[0].sums.numpy(), whole[0].maxima.numpy())
    assert merged.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_allclose(merged[name], column, rtol=1e-6, atol=1e-9)


def test_statistics_of_meta_modules_read_nothing_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()).to("meta")
    tap = tapped(model)
    model(torch.ones(300, 4, device="meta")).sum().backward()
    stats = tap.take()
    assert stats.sums.device.type == "meta"
    assert tap.coverage() == {}


@pytest.mark.parametrize("backend", ["tensor", "full"])
def test_a_tap_that_rests_sees_nothing_and_goes_on_as_one_that_is_armed_anew(backend: str) -> None:
    def trained(stop: str) -> list[dict]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        outputs: list[torch.Tensor] = []
        tap = ModuleTap(model, ["0", "1", "2"], backend=backend, on_output=lambda x: outputs.append(x.detach()))
        found = []
        for _ in range(4):
            tap.arm()
            loss = model(torch.randn(5, 3)).sum()
            loss.backward(retain_graph=True)
            found.append(columns_of(tap))
            getattr(tap, stop)()
            num_outputs = len(outputs)
            model(torch.ones(2, 3)).sum().backward()
            loss.backward()
            assert tap.take() is None
            assert len(outputs) == num_outputs
            # The graph of a step that is over belongs to no later one.
            tap.arm()
            assert tap.take() is None
            getattr(tap, stop)()
        tap.close()
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
        return found

    assert trained("rest") == trained("disarm")


def test_hooks_that_others_cleared_while_a_tap_rested_are_hung_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tap = ModuleTap(model, ["0", "1"])
    tap.arm()
    model(torch.ones(3, 2))
    tap.take()
    tap.rest()
    hung = list(model[0]._forward_hooks)
    model[1]._forward_hooks.clear()
    tap.arm()
    model(torch.ones(3, 2))
    assert set(columns_of(tap)["output_rms"]) == {"0", "1"}
    assert len(model[0]._forward_hooks) == len(hung) == 1
    tap.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
