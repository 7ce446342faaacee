"""AdaptiveClip, SpikeClip, Centralize, Noise, Sanitize, Normalize: what works on units and elements."""

import math

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError
from gradwatch.stats import Gradients
from gradwatch.treatments import (
    AdaptiveClip,
    Centralize,
    Noise,
    Normalize,
    Sanitize,
    SpikeClip,
    UnitLayout,
    adaptive_clip_,
    add_noise_,
    centralize_,
    normalize_,
    sanitize_,
    spike_clip_,
)

from ._steps import Step, gradients


def timm_agc(param: torch.Tensor, grad: torch.Tensor, ratio: float = 0.01, eps: float = 1e-3) -> torch.Tensor:
    """The formula of timm.utils.agc, written out."""

    def unitwise_norm(x: torch.Tensor) -> torch.Tensor:
        return x.norm(2.0) if x.ndim <= 1 else x.norm(2.0, dim=tuple(range(1, x.ndim)), keepdim=True)

    max_norm = unitwise_norm(param).clamp(min=eps) * ratio
    norm = unitwise_norm(grad)
    return torch.where(norm < max_norm, grad, grad * (max_norm / norm.clamp(min=1e-6)))


def with_random_gradients(model: nn.Module, size: float = 1.0) -> Gradients:
    for p in model.parameters():
        p.grad = torch.randn_like(p) * size
    return Gradients.collect(list(model.named_parameters()))


def test_adaptive_clip_by_hand() -> None:
    # Unit 0 has weight norm 5 and gradient norm 1 (limit .5); unit 1 weight 0, so the floor holds: limit 1e-4.
    param = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    grad = torch.tensor([[0.6, 0.8], [0.0, 1e-3]])
    clipped, units = adaptive_clip_([param], [grad], ratio=0.1)
    torch.testing.assert_close(grad, torch.tensor([[0.3, 0.4], [0.0, 1e-4]]))
    assert (int(clipped), units) == (2, 2)


@pytest.mark.parametrize("shape", [(6, 5), (6,), (4, 3, 2, 2), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 0.05, 10.0])
def test_adaptive_clip_agrees_with_the_usual_formula(shape: tuple[int, ...], size: float) -> None:
    torch.manual_seed(0)
    param, grad = torch.randn(shape), torch.randn(shape) * size
    param[0] = 0
    expected = timm_agc(param, grad)
    adaptive_clip_([param], [grad])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_units_of_transposed_convolutions_lie_on_the_second_axis(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups), nn.Linear(2, 2))
    treatment = AdaptiveClip(0.01)
    treatment.bind(model)
    grads = with_random_gradients(model)
    before = model[0].weight.grad.clone()
    treatment.apply_(grads, Step())
    # An output channel's weights: input channels of its group, its place in the group, the kernel.
    for channel in range(6):
        group, place = divmod(channel, 6 // groups)
        rows = slice(group * 4 // groups, (group + 1) * 4 // groups)
        weight, grad = model[0].weight.detach()[rows, place], before[rows, place]
        coefficient = min(1.0, float(0.01 * weight.norm().clamp(min=1e-3) / grad.norm()))
        torch.testing.assert_close(model[0].weight.grad[rows, place], grad * coefficient)


@pytest.mark.parametrize(
    ("head", "left_alone"),
    [
        ("auto", ["2.weight", "2.bias"]),
        (None, []),
        ("0.*", ["0.weight", "0.bias"]),
        (["0.bias", "2.*"], ["0.bias", "2.weight", "2.bias"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_bound", [True, False])
def test_the_last_layer_is_left_alone(head, left_alone: list[str], is_bound: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.LayerNorm(2))
    treatment = AdaptiveClip(0.001, head=head)
    if is_bound:
        treatment.bind(model)
    grads = with_random_gradients(model, 10.0)
    before = [g.clone() for g in grads.grads]
    treatment.apply_(grads, Step())
    same = [path for path, a, b in zip(grads.paths, before, grads.grads, strict=True) if torch.equal(a, b)]
    assert same == left_alone


def test_a_tied_head_is_found_under_its_first_name() -> None:
    model = nn.Module()
    model.embed, model.body, model.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
    model.head.weight = model.embed.weight
    treatment = AdaptiveClip(0.001)
    treatment.bind(model)
    grads = with_random_gradients(model, 10.0)
    before = model.embed.weight.grad.clone()
    treatment.apply_(grads, Step())
    assert torch.equal(model.embed.weight.grad, before)


def test_adaptive_clip_keeps_units_whose_squares_leave_float32() -> None:
    param, grad = torch.ones(1, 4), torch.full((1, 4), 1e30)
    adaptive_clip_([param], [grad], ratio=0.01)
    torch.testing.assert_close(grad, torch.full((1, 4), 0.01))


def test_adaptive_clip_takes_only_the_units_there_are_of_sparse_gradients() -> None:
    table = torch.ones(5, 4)
    grad = torch.sparse_coo_tensor([[1, 1, 3]], torch.ones(3, 4), (5, 4), check_invariants=True)
    clipped, units = adaptive_clip_([table], [grad], ratio=0.1)
    assert (int(clipped), units) == (2, 2)
    expected = torch.zeros(5, 4)
    expected[[1, 3]] = 0.1
    torch.testing.assert_close(grad.to_dense(), expected)


def test_spike_clip_by_hand() -> None:
    grad, second = torch.tensor([30.0, -30.0, 5.0, 9.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    # The limit is sqrt(100 * 1) = 10; a second moment of 0 knows no past.
    assert int(spike_clip_([grad], [second], 100.0)) == 2
    assert grad.tolist() == [10.0, -10.0, 5.0, 9.0]


def test_spike_clip_finds_the_second_moment_in_the_optimizer() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([param], betas=(0.9, 0.5))
    treatment = SpikeClip(4.0)
    for step, values in enumerate([[1.0, 1.0, 1.0], [1.0, 100.0, 1.0]]):
        param.grad = torch.tensor(values)
        report = treatment.apply_(Gradients.collect([("w", param)]), Step(step=step, optimizers=(optimizer,)))
        if step == 0:
            optimizer.step()
    # The second moment is .5 after one step, and the limit sqrt(4 * .5).
    torch.testing.assert_close(param.grad, torch.tensor([1.0, math.sqrt(2), 1.0]))
    assert float(report["clipped_share"]) == pytest.approx(1 / 3)


def test_spike_clip_says_so_where_there_is_no_second_moment() -> None:
    param = nn.Parameter(torch.zeros(1))
    treatment = SpikeClip()
    context = Step(optimizers=(torch.optim.SGD([param], lr=0.1),))
    with pytest.warns(UserWarning, match="SGD keeps no second moment"):
        treatment.apply_(gradients([1.0]), context)
    treatment.apply_(gradients([1.0]), context)


def test_spike_clip_waits_in_silence_for_adams_first_step() -> None:
    param = nn.Parameter(torch.zeros(1))
    grads = gradients([1.0])
    SpikeClip().apply_(grads, Step(optimizers=(torch.optim.Adam([param]),)))
    assert grads.tensors[0].tolist() == [1.0]


def test_centralize_by_hand() -> None:
    grads = [torch.tensor([[1.0, 3.0], [0.0, 4.0]]), torch.tensor([1.0, 3.0])]
    centralize_(grads)
    assert grads[0].tolist() == [[-1.0, 1.0], [-2.0, 2.0]]
    assert grads[1].tolist() == [1.0, 3.0]


def test_centralized_units_have_mean_zero_on_the_right_axis() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Conv2d(2, 3, 2))
    treatment = Centralize()
    treatment.bind(model)
    treatment.apply_(with_random_gradients(model), Step())
    torch.testing.assert_close(model[0].weight.grad.mean((0, 2)), torch.zeros(6))
    torch.testing.assert_close(model[1].weight.grad.mean((1, 2, 3)), torch.zeros(3))


def test_a_layer_of_one_unit_is_centralized_like_any_other() -> None:
    grads = [torch.tensor([[1.0, 3.0, 8.0]])]
    centralize_(grads)
    assert grads[0].tolist() == [[-3.0, -1.0, 4.0]]


def test_centralize_twice_is_centralize_once() -> None:
    once = torch.randn(5, 7, dtype=torch.float64)
    centralize_([once], layouts=[UnitLayout()])
    twice = once.clone()
    centralize_([twice])
    torch.testing.assert_close(once, twice)


def test_noise_has_the_variance_of_the_paper() -> None:
    treatment = Noise(0.3, 0.55)
    for step in (0, 99):
        grads = gradients(torch.zeros(200_000), grad_scale=4.0)
        report = treatment.apply_(grads, Step(step=step))
        std = math.sqrt(0.3 / (1 + step) ** 0.55)
        assert float(report["std"]) == pytest.approx(std)
        # Gradients are still multiplied by 4, so the noise is.
        assert float(grads.grads[0].std()) / 4 == pytest.approx(std, rel=0.01)


def test_noise_leaves_the_random_numbers_of_the_training_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Noise().apply_(gradients(torch.zeros(10)), Step())
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_the_same_on_every_rank_and_another_at_every_step() -> None:
    a, b = Noise(seed=1), Noise(seed=1)
    drawn = []
    for treatment in (a, b, a):
        grads = gradients(torch.zeros(10), torch.zeros(10))
        treatment.apply_(grads, Step())
        drawn.append(torch.stack(grads.grads))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_noise_kernel_reads_nothing_back() -> None:
    grads = [torch.zeros(3, device="meta")]
    add_noise_(grads, torch.ones((), device="meta"))
    assert grads[0].is_meta


def test_sanitize_counts_what_it_hides() -> None:
    treatment = Sanitize()
    grads = gradients([1.0, math.nan, math.inf], [2.0])
    report = treatment.apply_(grads, Step())
    assert grads.grads[0].tolist() == [1.0, 0.0, 0.0]
    assert float(report["count"]) == 2
    report = treatment.apply_(gradients([math.nan]), Step())
    assert float(report["hidden"]) == 3
    assert float(grads.global_norm) == pytest.approx(math.sqrt(5))
    assert int(sanitize_([])) == 0


def test_finite_gradients_whose_norm_overflows_hide_nothing() -> None:
    grads = gradients(torch.tensor([1.5e308, 1.5e308], dtype=torch.float64))
    assert float(grads.global_norm) == math.inf
    report = Sanitize().apply_(grads, Step())
    assert (float(report["count"]), bool(report["applied"])) == (0.0, False)
    assert grads.grads[0].tolist() == [1.5e308, 1.5e308]


def test_normalize_gives_the_norm_asked_for() -> None:
    grads = gradients([3.0], [4.0])
    Normalize(10.0).apply_(grads, Step())
    assert [float(g) for g in grads.grads] == pytest.approx([6.0, 8.0])
    grads = gradients([3.0], [0.0])
    Normalize(10.0, by="tensor").apply_(grads, Step())
    assert [float(g) for g in grads.grads] == pytest.approx([10.0, 0.0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_normalize_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    grad = torch.tensor([3.0, 4.0]) * scale
    assert float(normalize_([grad])[0]) == pytest.approx(5 * scale)
    torch.testing.assert_close(grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdaptiveClip(0), "AdaptiveClip: `ratio` must be a number above 0. Got 0."),
        (lambda: AdaptiveClip(floor=0), "AdaptiveClip: `floor` must be a number above 0. Got 0."),
        (lambda: SpikeClip(math.nan), "SpikeClip: `threshold` must be a number above 0. Got nan."),
        (lambda: Noise(-1), "Noise: `eta` must be a number above 0 and below inf. Got -1."),
        (lambda: Noise(seed=1.5), "Noise: `seed` must be a whole number of at least 0. Got 1.5."),
        (lambda: Normalize(by="layer"), "Normalize: `by` can't be 'layer'. Known: global, tensor."),
        (
            lambda: AdaptiveClip(head=3),
            "AdaptiveClip: `head` must be a glob pattern such as 'encoder.*' or a list of them. Got 3.",
        ),
    ],
)
def test_settings_that_cannot_be(build, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message
