"""Updates of any optimizer, within a bound on memory."""

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError
from gradwatch.stats import UpdateMeter


def params(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((n,), float(i + 1))) for i, n in enumerate(sizes)]


def move(tensors: list[nn.Parameter], by: float) -> None:
    with torch.no_grad():
        for t in tensors:
            t.add_(by)


def test_update_of_a_known_move() -> None:
    ps = params(4, 9)
    meter = UpdateMeter(ps, 1 << 20)
    meter.before()
    move(ps, 0.5)
    stats = meter.after()
    assert stats.positions == [0, 1]
    assert stats.update_norms.tolist() == [1.0, 1.5]
    assert stats.param_norms.tolist() == [2.0, 6.0]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_any_optimizer_is_measured_as_the_difference_it_makes(make) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    optimizer = make(model.parameters(), lr=0.1)
    meter = UpdateMeter(list(model.parameters()), 1 << 20)
    model(torch.ones(3, 5)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    meter.before()
    optimizer.step()
    stats = meter.after()
    expected = [(p.detach() - b).double().norm() for p, b in zip(model.parameters(), before, strict=True)]
    torch.testing.assert_close(stats.update_norms, torch.stack(expected), rtol=1e-5, atol=1e-9)


def test_subsets_rotate_within_the_bound_and_all_have_their_turn() -> None:
    ps = params(100, 200, 300, 50)
    meter = UpdateMeter(ps, 1300)
    seen = []
    for _ in range(4):
        meter.before()
        assert meter.held_bytes <= 1300
        move(ps, 1.0)
        stats = meter.after()
        seen.append(stats.positions)
        expected = torch.tensor([float(ps[i].numel()) ** 0.5 for i in stats.positions], dtype=torch.float64)
        torch.testing.assert_close(stats.update_norms, expected)
    assert {i for positions in seen for i in positions} == {0, 1, 2, 3}
    assert seen[0] != seen[1]


def test_parameter_above_the_bound_is_left_out_and_said_so() -> None:
    ps = params(10, 10_000)
    meter = UpdateMeter(ps, 1000)
    assert meter.left_out == [1]
    meter.before()
    assert meter.after().positions == [0]


def test_no_room_at_all_measures_nothing() -> None:
    meter = UpdateMeter(params(10), 0)
    meter.before()
    assert meter.after().positions == []
    with pytest.raises(ConfigError, match=r"`memory_limit_bytes` must be at least 0\. Got -1\."):
        UpdateMeter([], -1)


def test_discarded_step_needs_a_new_before() -> None:
    meter = UpdateMeter(params(10), 1000)
    meter.before()
    meter.discard()
    with pytest.raises(RuntimeError, match="needs a call of `before` first"):
        meter.after()
    meter.release()
    assert meter.held_bytes == 0


def test_mixed_dtypes_and_empty_parameters_are_measured() -> None:
    ps = [nn.Parameter(torch.ones(3, 3, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float64)]
    ps.append(nn.Parameter(torch.zeros(0)))
    meter = UpdateMeter(ps, 1 << 20)
    meter.before()
    move(ps, 1.0)
    stats = meter.after()
    assert stats.update_norms.tolist() == [3.0, 3.0, 3.0, 0.0]
    assert stats.param_norms.tolist() == [3.0, 3.0, 3.0, 0.0]


def test_transposed_parameters_are_copied_by_shape() -> None:
    p = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    meter = UpdateMeter([p], 1 << 10)
    meter.before()
    assert meter.after().update_norms.tolist() == [0.0]


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_norms_beyond_the_range_of_squares_are_measured(size: float) -> None:
    p = nn.Parameter(torch.full((4,), size, dtype=torch.float64))
    meter = UpdateMeter([p], 1 << 10)
    meter.before()
    move([p], size)
    stats = meter.after()
    torch.testing.assert_close(stats.update_norms.item(), 2 * size, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.param_norms.item(), 2 * size, rtol=1e-6, atol=0)
