"""Norms as the optimizer will use them: against float64 references."""

import math

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.errors import GradwatchWarning
from gradwatch.rules import Expression, NonFinite
from gradwatch.stats import UpdateMeter
from gradwatch.treatments import ClipByGlobalNorm, SkipStep
from gradwatch.watch import Session, StepInputs, forget_step, resolve
from gradwatch.watch._formulas import formula_scalars


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def reference(params: list[tuple[str, Tensor]], scale: float = 1.0) -> dict[str, float]:
    return {n: float(torch.linalg.vector_norm(p.grad.double())) / scale for n, p in params if p.grad is not None}


def norms_of(record, paths) -> dict[str, float]:
    """Return norms of some parameters, and the global norm, as they stand on record."""
    return {path: record["grad_norm", path] for path in paths} | {"": record.global_norm}


def near(expected: dict[str, float], rtol: float = 1e-5):
    total = math.sqrt(sum(v * v for v in expected.values()))
    return pytest.approx(expected | {"": total}, rel=rtol)


def test_norms_equal_a_float64_reference_under_accumulation() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with Watch(model, optimizer, on_error="raise") as watch:
        for _ in range(3):
            for _ in range(4):
                (model(torch.randn(8, 6)).square().mean() / 4).backward()
            expected = reference(list(model.named_parameters()))
            record = watch.step().record
            optimizer.zero_grad()
            assert norms_of(record, expected) == near(expected)


def test_norms_are_unscaled_under_a_loss_scaler() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with Watch(model, optimizer, scaler=scaler, on_error="raise") as watch:
        for _ in range(2):
            loss = model(torch.randn(8, 6)).square().mean()
            scaler.scale(loss).backward()
            expected = reference(list(model.named_parameters()), scale=65536.0)
            record = watch.step(loss=loss).record
            optimizer.zero_grad()
            assert norms_of(record, expected) == near(expected)
            assert record.scalars["grad_scale"] == 65536.0
            assert record.scalars["amp_overflow"] == 0.0


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_the_global_norm_keeps_what_float64_can_hold_and_its_squares_can_not(size: float) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3))).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, rules="observe", on_error="raise") as watch:
        for p, part in zip(model.parameters(), (2.0, 3.0, 6.0), strict=True):
            p.grad = torch.full_like(p, part * size)
        record = watch.step().record
    assert record.global_norm == pytest.approx(7.0 * size, rel=1e-6)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_clip_ahead_of_the_measurement_is_seen_at_every_step_that_is_measured(every: int) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    with Watch(model, optimizer, rules="observe", every=every, on_error="raise") as watch:
        for step in range(12):
            model(torch.randn(8, 6)).square().mean().backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
            norms += [norm] if step % every == 0 else []
            watch.step()
            optimizer.zero_grad()
        found = [record.global_norm for record in watch.history]
        applied = [record.scalars["global_norm_applied"] for record in watch.history]
    assert found == pytest.approx(norms, rel=1e-4)
    assert applied == pytest.approx([1e-3] * len(norms), rel=1e-2)


def test_gradients_changed_by_ways_that_show_nowhere_are_told_right_after_sixteen_records_at_most() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    left = []
    norms_alone = {"activations_every": None, "updates_every": None, "histograms_every": None}
    with Watch(model, optimizer, rules="observe", on_error="raise", **norms_alone) as watch:
        for step in range(48):
            model(torch.randn(8, 6)).square().mean().backward()
            if step >= 5:
                for p in model.parameters():
                    p.grad.data.mul_(0.25)  # no version counter counts it
            left.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
            watch.step()
            optimizer.zero_grad()
        records = watch.history
    applied = [record.scalars.get("global_norm_applied", math.nan) for record in records]
    assert applied[:5] == pytest.approx(left[:5], rel=1e-5)
    assert applied[22:] == pytest.approx(left[22:], rel=1e-5)


def test_what_gradwatch_clips_is_told_as_its_own_doing_alone() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules="observe", treatments=[ClipByGlobalNorm(1e-3)], on_error="raise") as watch:
        for _ in range(4):
            model(torch.randn(8, 6)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
        records, text = watch.history, watch.summary()
    assert [r.scalars["global_norm_applied"] for r in records] == pytest.approx([1e-3] * 4, rel=1e-4)
    assert [r.global_norm_after for r in records] == pytest.approx([1e-3] * 4, rel=1e-4)
    assert "became" not in text


def test_rows_that_add_up_to_one_are_classes_where_none_of_them_is_negative() -> None:
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    pred = torch.randn(3, 2)
    found = formula_scalars(pred, shares)
    assert float(found["cross_entropy"]) == pytest.approx(float(nn.functional.cross_entropy(pred, shares)))
    shares[0] = torch.tensor([-0.5, 1.5])
    assert math.isnan(formula_scalars(pred, shares).get("cross_entropy", math.nan))


def test_a_step_that_is_measured_once_more_is_on_record_once_and_whole() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, rules="observe", updates_every=1, on_error="raise") as watch:
        for _ in range(3):
            for _ in range(2):  # a trainer that can't tell which backward of a step is its last
                model(torch.randn(8, 6)).square().mean().backward()
                forget_step(watch.session.engine)
                watch.after_backward()
            expected = reference(list(model.named_parameters()))
            optimizer.step()
            watch.after_step()
            assert norms_of(watch.history[-1], expected) == near(expected)
            optimizer.zero_grad()
        assert [record.step for record in watch.history] == [0, 1, 2]


@pytest.mark.parametrize("every", [1, None], ids=["modules-too", "norms-alone"])
def test_gradients_that_nobody_resets_are_known_by_it_however_many_micro_batches_a_step_has(every: int | None) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules="observe", activations_every=every, on_error="raise") as watch:
        for step in range(6):
            if step >= 3:
                optimizer.zero_grad(set_to_none=False)
            for number in range(3):
                loss = model(torch.randn(8, 6)).square().mean()
                loss.backward()
                if number < 2:
                    watch.micro_batch(loss, batch=torch.zeros(8, 6))
            watch.step(loss, batch=torch.zeros(8, 6))
        records = watch.history
    assert [record.scalars.get("grads_kept") for record in records] == [None, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [record.num_samples for record in records] == [24] * 6


def test_samples_are_counted_in_the_batch_where_a_trainer_tells_no_number_of_them() -> None:
    model = small_model()
    session = Session(model, [torch.optim.SGD(model.parameters(), lr=0.1)], resolve(rules="observe"))
    batch = torch.randn(8, 6)
    for inputs in (StepInputs(step=0, batch=batch), StepInputs(step=1, batch=batch, num_samples=24)):
        model(batch).square().mean().backward()
        session.step(inputs)
        session.after_step()
    session.close()
    assert [record.num_samples for record in session.engine.completion.history] == [8, 24]


def test_who_changes_gradients_after_a_treatment_is_told_from_what_the_treatment_left() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, rules="observe", treatments=[ClipByGlobalNorm(1e-3)], on_error="raise") as watch:
        for _ in range(3):
            model(torch.randn(8, 6)).square().mean().backward()
            watch.after_backward()
            for p in model.parameters():
                p.grad.mul_(0.5)
            optimizer.step()
            watch.after_step()
            optimizer.zero_grad()
        text = watch.summary()
    assert "the norm 0.001 became 0.0005" in text


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_how_far_running_statistics_have_followed_is_a_share(momentum: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, rules="observe", updates_every=1, on_error="raise") as watch:
        for _ in range(4):
            model(torch.randn(8, 3)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
        found = [record.scalars["batch_norm_followed"] for record in watch.history]
    assert found == pytest.approx([1 - (1 - momentum) ** count for count in range(1, 5)], abs=1e-6)


def test_an_overflow_under_a_loss_scaler_is_no_fault() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Watch(model, optimizer, scaler=scaler, rules="autoclip", on_error="raise") as watch:
        for i in range(6):
            loss = model(torch.randn(8, 6)).square().mean()
            scaler.scale(loss * (math.inf if i == 2 else 1.0)).backward()
            before = [p.detach().clone() for p in model.parameters()]
            record = watch.step(loss=loss).record
            optimizer.zero_grad()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (i != 2)
            assert record.skipped == (i == 2)
    assert scaler.get_scale() == 512.0
    assert [i.rule for i in watch.incidents] == []
    assert watch.history[-1].scalars["num_overflows"] == 1.0


@pytest.mark.parametrize("through", ["every-step", "a-rule"])
def test_what_the_loss_scaler_drops_is_not_treated_nor_counted(through: str) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    skip, clip = SkipStep(max_consecutive=2), ClipByGlobalNorm(1e-3)
    parts = {"every-step": {"treatments": [clip, skip], "rules": "observe"}}.get(
        through, {"rules": [Expression("step >= 0", name="always", then=clip), NonFinite(then=skip)]}
    )
    with Watch(model, optimizer, scaler=scaler, on_error="raise", **parts) as watch:
        for i in range(8):
            loss = model(torch.randn(8, 6)).square().mean()
            scaler.scale(loss * (math.inf if 2 <= i < 6 else 1.0)).backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    overflows = [bool(r.scalars["amp_overflow"]) for r in watch.history]
    assert overflows == [2 <= i < 6 for i in range(8)]
    assert [bool(r.treatments) for r in watch.history] == [not overflow for overflow in overflows]
    assert watch.session.engine.completion.num_skipped == 0


@pytest.mark.parametrize(
    ("values", "share"),
    [
        pytest.param([0.0, 0.0, 1.0, 1.0], 0.0, id="a-zero-is-none"),
        pytest.param([2.0**-14, -(2.0**-14), 1.0, 2.0], 0.0, id="the-smallest-normal-is-none"),
        pytest.param([2.0**-14 * 0.999, 2.0**-13, 1.0, 0.0], 0.25, id="just-below-is-one"),
        pytest.param([-(2.0**-15), 2.0**-15, 1.0, 1.0], 0.5, id="of-either-sign"),
        pytest.param([2.0**-126, 1e-30, -1e-30, 1e-5], 1.0, id="down-to-the-least"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("times", [1, 1 << 15])
def test_what_a_float16_would_hold_as_denormal_underflows(
    values: list[float], share: float, dtype: torch.dtype, times: int
) -> None:
    values = [2.0**-15 if v == 2.0**-14 * 0.999 and dtype is torch.bfloat16 else v for v in values]
    weight = nn.Parameter(torch.zeros(len(values) * times, dtype=dtype))
    model = nn.ParameterDict({"w": weight})
    with Watch(model, torch.optim.SGD([weight], lr=0.1), histograms_every=1, on_error="raise") as watch:
        weight.grad = torch.tensor(values, dtype=dtype).repeat(times)
        record = watch.step().record
    assert record["underflow_fraction", "w"] == share


def test_tied_weights_count_once() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"tokens": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["tokens"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, on_error="raise") as watch:
        model["head"](model["tokens"](torch.arange(10))).square().sum().backward()
        expected = reference(list(model.named_parameters()))
        assert norms_of(watch.step().record, expected) == near(expected)
    assert len(expected) == 1


def test_half_precision_gradients_whose_own_norm_overflows_are_measured() -> None:
    model = nn.Linear(1000, 1000, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, on_error="raise") as watch:
        model.weight.grad = torch.full_like(model.weight, 100.0)
        record = watch.step().record
    assert record["grad_norm", "weight"] == pytest.approx(1e5, rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e25, 1e30])
def test_gradients_far_from_one_are_measured(size: float) -> None:
    model = nn.Linear(50, 40, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, on_error="raise") as watch:
        model.weight.grad = torch.randn(40, 50).mul_(size)
        expected = float(torch.linalg.vector_norm(model.weight.grad.double()))
        record = watch.step().record
    assert record["grad_norm", "weight"] == pytest.approx(expected, rel=1e-5)
    assert record.global_norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_tensor_of_1e8_elements_is_measured_to_1e_5() -> None:
    model = nn.ParameterDict({"big": torch.zeros(100_000_000)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, on_error="raise", updates_every=None, histograms_every=None) as watch:
        model["big"].grad = torch.full((100_000_000,), 0.1)
        record = watch.step().record
    assert record.global_norm == pytest.approx(float(torch.tensor(0.1)) * 1e4, rel=1e-5)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_update_ratio_is_that_of_the_step_itself_for_any_optimizer(make) -> None:
    model = small_model()
    optimizer = make(model.parameters(), lr=0.01)
    with Watch(model, optimizer, updates_every=1, on_error="raise") as watch:
        for step in range(3):
            before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
            model(torch.randn(8, 6)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
            record = watch.history[step]
            assert record.step == step
            for n, p in model.named_parameters():
                expected = float((p.detach().double() - before[n]).norm() / before[n].norm())
                assert record["update_ratio", n] == pytest.approx(expected, rel=1e-4)


def test_frozen_and_gradless_parameters_are_masked_not_zero() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Watch(model, optimizer, on_error="raise") as watch:
        model(torch.randn(8, 6)).square().mean().backward()
        model[4].bias.grad = None
        record = watch.step().record
    with pytest.raises(KeyError, match="not measured"):
        record["grad_norm", "0.weight"]
    with pytest.raises(KeyError, match="not measured"):
        record["grad_norm", "4.bias"]
    assert record["grad_norm", "4.weight"] > 0


def test_activation_and_grad_output_columns_equal_references() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(32, 6)
    with Watch(model, optimizer, activations_every=1, on_error="raise") as watch:
        hidden = model[0](x)
        hidden.retain_grad()
        out = model[4](model[3](model[2](model[1](hidden.clone()))))
        out.square().mean().backward()
        record = watch.step().record
    assert record["output_rms", "0"] == pytest.approx(float(hidden.detach().double().square().mean().sqrt()), rel=1e-5)
    assert record["grad_output_norm", "0"] == pytest.approx(float(hidden.grad.double().norm()), rel=1e-5)
    assert record["output_zero_fraction", "1"] == pytest.approx(float((hidden <= 0).double().mean()), rel=1e-6)


def test_unfreezing_adding_and_replacing_parameters_in_mid_run_is_followed() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Watch(model, optimizer, on_error="raise") as watch:

        def step():
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            expected = reference([(n, p) for n, p in model.named_parameters() if p.requires_grad])
            assert norms_of(watch.step().record, expected) == near(expected)

        step()
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters())})
        step()
        old = model[4].weight
        model[4].weight = nn.Parameter(torch.randn(3, 16))
        for group in optimizer.param_groups:
            group["params"] = [model[4].weight if p is old else p for p in group["params"]]
        step()
        assert watch.history[-1]["grad_norm", "0.weight"] > 0


def test_a_step_that_was_vetoed_has_no_update_on_record_instead_of_one_of_zero() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rules = [Expression("step == 2", name="skipped", then=SkipStep())]
    with Watch(model, optimizer, rules=rules, updates_every=1, on_error="raise") as watch:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            watch.step()
        records = list(watch.history)
    assert [record.skipped for record in records] == [False, False, True, False, False]
    assert [record.measured("update_ratio").any() for record in records] == [True, True, False, True, True]


def test_updates_that_can_not_be_measured_are_tried_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(meter: UpdateMeter, pieces: list[Tensor]) -> None:
        tried.append(len(pieces))
        raise RuntimeError("no room")

    def train() -> Watch:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Watch(model, optimizer, updates_every=1) as watch:
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(8, 6)).square().mean().backward()
                watch.step()
        return watch

    monkeypatch.setattr(UpdateMeter, "_room_for", fails)
    with pytest.warns(GradwatchWarning, match="update ratios") as told:
        watch = train()
    assert (len(tried), len(told), len(watch.history)) == (1, 1, 4)
    assert not any(record.measured("update_ratio").any() for record in watch.history)


def test_how_far_rows_are_apart_is_told_once_of_weights_that_have_several() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    nn.init.ones_(model[1].weight)
    weight = model[0].weight.detach().clone()
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), on_error="raise") as watch:
        for _ in range(2):
            model(torch.randn(8, 6)).square().mean().backward()
            watch.step()
        first, second = watch.history
    expected = float((weight.amax(0) - weight.amin(0)).max() / weight.abs().max())
    assert first["row_spread", "0.weight"] == pytest.approx(expected)
    assert first["row_spread", "1.weight"] == 0.0
    assert first.measured("row_spread").sum() == 2  # neither biases nor the weight of one row
    assert not second.measured("row_spread").any()


def test_update_ratios_of_optimizers_that_step_together_are_all_measured() -> None:
    model = small_model()
    optimizers = [torch.optim.Adam(model[i].parameters(), lr=0.01) for i in (0, 2, 4)]
    with Watch(model, optimizers, updates_every=1, on_error="raise") as watch:
        for _ in range(3):
            model(torch.randn(8, 6)).square().mean().backward()
            watch.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        for record in watch.history:
            assert all(record["update_norm", path] > 0 for path, _ in model.named_parameters())


def test_grad_output_of_a_linear_on_sequences_survives_an_in_place_activation() -> None:
    # The output is a view there: a later in-place operation drops plain tensor hooks on it.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))
    twin = nn.Sequential(model[0], nn.ReLU(), model[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(4, 5, 6)
    norms = []
    for net in (model, twin):
        with Watch(net, optimizer, activations_every=1, on_error="raise") as watch:
            net(x).square().mean().backward()
            norms.append(watch.step().record["grad_output_norm", "0"])
        optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 0


def test_settings_are_told_where_a_group_of_parameters_has_no_memory_yet() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = [{"params": layer.parameters()} for layer in model]
    optimizer = torch.optim.AdamW(groups, eps=1e-3)
    model[0].requires_grad_(False)
    with Watch(model, optimizer, rules="observe", updates_every=1, on_error="raise") as watch:
        for _ in range(3):
            model(torch.randn(5, 4)).square().mean().backward()
            # As the step finds them.
            moments = [s["exp_avg_sq"].clone() for s in optimizer.state.values()]
            watch.step()
            optimizer.zero_grad()
    last = watch.history[-1].scalars
    assert last["num_second_moments"] == sum(v.numel() for v in moments)
    assert last["second_moments"] == pytest.approx(sum(float(v.sum()) for v in moments))
    assert last["epsilon"] == pytest.approx(1e-3)


def test_of_weights_too_large_to_copy_the_update_is_an_estimate_whose_error_is_on_record() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules="observe", updates_every=1, memory_limit_mb=0.2, on_error="raise") as watch:
        old = model[0].weight.detach().clone()
        model(torch.randn(16, 300)).square().mean().backward()
        watch.step()
        true = float((model[0].weight.detach() - old).double().norm())
    record = watch.history[0]
    error = record.scalars["update_error"]
    assert 0 < error < 0.5
    assert abs(record["update_norm", "0.weight"] / true - 1) <= 5 * error
    assert record["update_norm", "0.weight"] != pytest.approx(true, rel=1e-9)  # not all elements were looked at
