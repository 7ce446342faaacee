"""The mathematics: values that can be checked by hand, laws, and agreement with torchjd."""

from __future__ import annotations

import pytest
import torch

from gradwatch.errors import ConfigError, UnknownNameError
from gradwatch.treatments.surgery import METHODS, weights
from gradwatch.treatments.surgery._solvers import solve_lcp

J = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
ANCHORS = [
    ("mean", {}, (1, 1, 1)),
    ("sum", {}, (2, 2, 2)),
    ("pcgrad", {}, (0.5848, 3.8012, 3.8012)),
    ("gradvac", {}, (0.5848, 3.8012, 3.8012)),
    ("upgrad", {}, (0.2924, 1.9006, 1.9006)),
    ("dualproj", {}, (5 / 9, 10 / 9, 10 / 9)),
    ("cagrad", {"c": 0.5}, (0.1835, 1.2041, 1.2041)),
    ("mgda", {}, (0, 1, 1)),
    ("imtl_g", {}, (0.0767, 1, 1)),
    ("aligned_mtl", {}, (0.2133, 0.9673, 0.9673)),
    ("nash_mtl", {}, (0.0766, 0.9985, 0.9985)),
    ("fairgrad", {"alpha": 2.0}, (0.0313, 0.7908, 0.7908)),
    ("config", {}, (0.1588, 2.0706, 2.0706)),
]


def random_task_gradients(seed: int, k: int, size: int, *, spread: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, size, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(-spread, spread, k, dtype=torch.float64)[:, None]


def test_every_method_has_an_anchor() -> None:
    assert {name for name, _, _ in ANCHORS} == set(METHODS)


@pytest.mark.parametrize(("method", "options", "direction"), ANCHORS, ids=[a[0] for a in ANCHORS])
def test_weights_combine_the_anchor_to_four_digits(method, options, direction) -> None:
    combined = weights(method, J @ J.T, **options) @ J
    torch.testing.assert_close(combined, torch.tensor(direction, dtype=torch.float64), atol=5.1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 1e3, 1e6, 1e30])
@pytest.mark.parametrize(("method", "options", "direction"), ANCHORS, ids=[a[0] for a in ANCHORS])
def test_direction_does_not_depend_on_the_scale_of_the_gradients(method, options, direction, scale) -> None:
    scaled = J * scale
    combined = weights(method, scaled @ scaled.T, **options) @ scaled
    expected = weights(method, J @ J.T, **options) @ J
    torch.testing.assert_close(combined / combined.norm(), expected / expected.norm(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"pcgrad", "gradvac"}))
def test_tasks_in_another_order_get_the_same_weights(method) -> None:
    rows = random_task_gradients(3, 5, 20)
    order = torch.tensor([3, 0, 4, 2, 1])
    expected = weights(method, rows @ rows.T)[order]
    torch.testing.assert_close(weights(method, rows[order] @ rows[order].T), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["upgrad", "dualproj", "mgda", "nash_mtl", "fairgrad", "config"])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_result_conflicts_with_no_task(method, k) -> None:
    rows = random_task_gradients(k, k, 40, spread=1.0)
    G = rows @ rows.T
    gains = G @ weights(method, G)
    assert (gains >= -1e-6 * G.diagonal()).all()


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[1.0, 2, 3]], id="one-task"),
        pytest.param([[1.0, 2, 3], [1, 2, 3]], id="same-twice"),
        pytest.param([[1.0, 2, 3], [-1, -2, -3]], id="opposite"),
        pytest.param([[1.0, 2, 3], [0, 0, 0]], id="one-is-zero"),
        pytest.param([[0.0, 0], [0, 0]], id="all-zero"),
        pytest.param([[1e-8, 0], [1e8, 1]], id="sixteen-decades-apart"),
        pytest.param([[1.0, 0], [-1, 1e-9], [0, -1], [0.5, 0.5], [0.1, -0.7]], id="more-tasks-than-parameters"),
    ],
)
def test_weights_stay_finite_on_degenerate_gramians(method, rows) -> None:
    matrix = torch.tensor(rows, dtype=torch.float64)
    result = weights(method, matrix @ matrix.T)
    assert result.shape == (len(rows),)
    assert torch.isfinite(result).all()
    assert torch.isfinite(result @ matrix).all()


def test_pcgrad_without_conflict_is_exactly_the_sum() -> None:
    assert weights("pcgrad", torch.tensor([[1.0, 0.1], [0.1, 2.0]])).tolist() == [1.0, 1.0]


def test_pcgrad_order_depends_on_the_step_alone() -> None:
    rows = random_task_gradients(0, 6, 4)
    G = rows @ rows.T
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights("pcgrad", G, step=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(weights("pcgrad", G, step=7), first)
    assert not torch.equal(weights("pcgrad", G, step=8), first)


def test_nash_weights_solve_the_bargaining_condition() -> None:
    rows = random_task_gradients(1, 6, 30, spread=2.0)
    G = rows @ rows.T
    a = weights("nash_mtl", G)
    torch.testing.assert_close(G @ a * a, torch.ones_like(a), rtol=1e-9, atol=0)


def test_complementarity_solver_agrees_with_enumeration() -> None:
    for seed in range(30):
        rows = random_task_gradients(seed, 4, 4)
        A = rows @ rows.T + 1e-3 * torch.eye(4)
        q = random_task_gradients(seed + 100, 1, 4)
        (x,) = solve_lcp(A, q)
        best = min(_enumerate(A, q[0]), key=lambda y: float(y @ A @ y / 2 + q[0] @ y))
        torch.testing.assert_close(x, best, atol=1e-9, rtol=1e-9)


def _enumerate(A: torch.Tensor, q: torch.Tensor) -> list[torch.Tensor]:
    """Every non-negative stationary point on a face of the orthant."""
    k = len(A)
    found = []
    for mask in range(2**k):
        free = [i for i in range(k) if mask >> i & 1]
        x = torch.zeros_like(q)
        if free:
            x[free] = torch.linalg.solve(A[free][:, free], -q[free])
        if (x >= -1e-12).all():
            found.append(x)
    return found


@pytest.mark.parametrize("k", [2, 3, 6])
def test_cagrad_gains_more_for_its_worst_task_than_any_direction_nearby(k) -> None:
    rows = random_task_gradients(k, k, 15)
    G = rows @ rows.T
    w = weights("cagrad", G, c=0.4)
    mean = rows.mean(0)
    d = w @ rows
    assert float((d - mean).norm()) == pytest.approx(0.4 * float(mean.norm()), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        other = d + 0.05 * mean.norm() * torch.randn(15, generator=generator, dtype=torch.float64) / 15**0.5
        other = mean + (other - mean) * (0.4 * mean.norm() / (other - mean).norm()).clamp(max=1)
        assert float((rows @ other).min()) <= float((rows @ d).min()) * (1 + 1e-9)


def test_mgda_finds_the_shortest_vector_of_the_hull() -> None:
    rows = random_task_gradients(2, 5, 4)
    G = rows @ rows.T
    w = weights("mgda", G)
    assert float(w.sum()) == pytest.approx(1)
    assert (w >= 0).all()
    # Optimal if and only if no vertex lies nearer along the result: <g_i, d> >= |d|^2.
    assert (G @ w >= w @ G @ w - 1e-9).all()


def test_preference_moves_upgrad_towards_a_task() -> None:
    G = J @ J.T
    preferred = weights("upgrad", G, pref=[0.9, 0.1])
    assert preferred[0] / preferred[1] > weights("upgrad", G)[0] / weights("upgrad", G)[1]


def test_a_callable_is_a_method() -> None:
    assert weights(lambda G: G.diagonal().rsqrt(), J @ J.T).tolist() == pytest.approx([18**-0.5, 38**-0.5])


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        weights("pcgrd", J @ J.T)
    assert str(caught.value) == "there is no surgery method 'pcgrd'. Did you mean 'pcgrad' or 'upgrad' or 'cagrad'?"


def test_unknown_option_names_the_known() -> None:
    with pytest.raises(UnknownNameError) as caught:
        weights("cagrad", J @ J.T, alpha=1.0)
    assert str(caught.value) == "there is no option of cagrad 'alpha'. Known: c, rescale."


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("cagrad", {"c": float("nan")}, "`c` of cagrad must be at least 0. Got nan."),
        ("cagrad", {"rescale": "half"}, "`rescale` of cagrad must be one of ['length', 'none', 'square']. Got 'half'."),
        ("fairgrad", {"alpha": 0.0}, "`alpha` of fairgrad must be above 0. Got 0.0."),
        ("gradvac", {"beta": float("nan")}, "`beta` of gradvac must be in [0, 1]. Got nan."),
        ("upgrad", {"reg": float("nan")}, "`reg` must be at least 0. Got nan."),
        ("upgrad", {"pref": [1.0]}, "`pref` must hold 2 numbers >= 0, one a task. Got [1.0]."),
    ],
)
def test_settings_of_methods_are_checked(method, options, message) -> None:
    with pytest.raises(ConfigError) as caught:
        weights(method, J @ J.T, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (torch.ones(2, 3), "a Gramian is a square matrix, one row a task. Got shape (2, 3)."),
        (
            torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]),
            "the Gramian is not finite: tasks [0, 1] have inner products that are nan or inf.",
        ),
    ],
)
def test_gramian_is_checked(gramian, message) -> None:
    with pytest.raises(ConfigError) as caught:
        weights("pcgrad", gramian)
    assert str(caught.value) == message


def test_callable_with_the_wrong_shape_is_named() -> None:
    def three(_: torch.Tensor) -> torch.Tensor:
        return torch.ones(3)

    with pytest.raises(ConfigError, match="method 'three' must return 2 weights for a Gramian of 2 tasks"):
        weights(three, J @ J.T)
