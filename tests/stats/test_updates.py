"""Updates of any optimizer, within a bound on memory."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError
from gradwatch.stats import UpdateMeter
from gradwatch.stats._update_samples import Sample


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


def test_of_all_that_does_not_fit_whole_a_sample_is_measured_every_time() -> None:
    ps = params(1000, 20_000, 300, 5000, 0)
    meter = UpdateMeter(ps, 20_000)
    for _ in range(3):
        before = [float(p.detach()[0]) if len(p) else 0.0 for p in ps]
        meter.before()
        assert meter.held_bytes <= 20_000
        move(ps, 0.5)
        stats = meter.after()
        assert stats.positions == [0, 1, 2, 3, 4]
        # Of equal elements every sample says the same.
        sizes = torch.tensor([float(p.numel()) ** 0.5 for p in ps], dtype=torch.float64)
        torch.testing.assert_close(stats.update_norms, 0.5 * sizes)
        torch.testing.assert_close(stats.param_norms, sizes * torch.tensor(before, dtype=torch.float64))
        assert stats.errors.tolist() == [0.0] * 5
    assert meter.is_sampled
    assert not meter.left_out


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(torch.randn, id="normal"),
        pytest.param(lambda n: torch.rand(n) ** 8, id="few-large-ones"),
        pytest.param(lambda n: (torch.arange(n) % 1000 < 40).float(), id="in-heaps"),
    ],
)
@pytest.mark.parametrize("shape", [(400, 100), (100, 20, 20), (39_999,)])
def test_estimates_are_right_on_the_average_and_so_are_their_errors(make, shape) -> None:
    torch.manual_seed(1)
    numel = torch.Size(shape).numel()
    piece, step = torch.ones(shape), make(numel).view(shape)
    true = step.double().square().sum()
    found = []
    for seed in range(300):
        sample = Sample(piece, 4096, seed)
        copy = torch.empty(sample.shape)
        sample.copy(piece, copy)
        assert copy.nbytes <= 4096
        found.append(sample.moved(copy, piece - step))
    squares, norms, variances = torch.stack(found).unbind(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, float(numel)), rtol=1e-6, atol=0)
    # Within four standard errors of the mean over the draws.
    assert abs(squares.mean() - true) <= 4 * squares.std() / len(found) ** 0.5 + 1e-6 * true
    torch.testing.assert_close(variances.mean(), squares.var(), rtol=0.35, atol=1e-6 * float(true) ** 2)


def test_the_same_elements_are_compared_at_every_step_and_by_all_who_hold_the_same() -> None:
    ps = params(50_000)
    meters = [UpdateMeter(ps, 8000) for _ in range(2)]
    found = []
    for meter in (*meters, meters[0]):
        with torch.no_grad():
            ps[0].copy_(torch.arange(50_000.0))
        meter.before()
        with torch.no_grad():
            ps[0].mul_(1.5)
        found.append(meter.after().update_norms.item())
    assert found[0] == found[1] == found[2]


def test_weights_of_any_order_in_memory_are_sampled() -> None:
    image = torch.ones(8, 16, 20, 20).to(memory_format=torch.channels_last)
    ps = [nn.Parameter(torch.ones(64, 200).T), nn.Parameter(image)]
    meter = UpdateMeter(ps, 12_000)
    meter.before()
    move(ps, 1.0)
    stats = meter.after()
    assert meter.is_sampled
    torch.testing.assert_close(stats.update_norms, torch.tensor([12_800.0, 51_200.0], dtype=torch.float64).sqrt())


def test_parameter_of_which_no_sample_fits_is_left_out_and_said_so() -> None:
    ps = params(10, 10_000)
    meter = UpdateMeter(ps, 800)
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


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.float64)])
def test_where_all_parameters_are_empty_their_updates_are_of_no_length(dtypes) -> None:
    ps = [nn.Parameter(torch.zeros(0, 4, dtype=d)) for d in dtypes]
    meter = UpdateMeter(ps, 1 << 20)
    meter.before()
    stats = meter.after()
    assert stats.update_norms.tolist() == stats.param_norms.tolist() == [0.0] * len(ps)


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


def lent_to_the_system() -> int:
    """Bytes of this process that the system may take back when memory is short."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree:"))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what pages are lent")
def test_between_steps_that_all_need_them_the_pages_of_copies_are_lent_to_the_system() -> None:
    param = nn.Parameter(torch.ones(2**20))
    meter = UpdateMeter([param], 2**24)
    for step in range(1, 4):
        meter.before()
        with torch.no_grad():
            param += 1
        assert meter.after().update_norms.tolist() == pytest.approx([2**10], rel=1e-6), step
        meter.release(soon_again=True)
        assert meter.held_bytes == 0
        assert lent_to_the_system() >= 2**21
    meter.release()
    assert lent_to_the_system() < 2**21
