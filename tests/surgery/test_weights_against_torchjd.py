"""torchjd as oracle: equal where its solver converges, a better objective where it does not."""

from __future__ import annotations

import pytest
import torch

from gradwatch.treatments.surgery import weights

aggregation = pytest.importorskip("torchjd.aggregation")

CASES = [
    (seed, k, size, spread)
    for seed, (k, size, spread) in enumerate(
        [(2, 3, 0.0), (2, 50, 1.0), (3, 6, 0.0), (3, 50, 1.0), (5, 3, 0.0), (5, 50, 0.5), (8, 50, 0.0), (12, 6, 0.0)]
    )
]


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case[0]}-{case[1]}tasks-{case[2]}parameters-spread{case[3]}")
def rows(request) -> torch.Tensor:
    seed, k, size, spread = request.param
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(k, size, generator=generator, dtype=torch.float64)
    return matrix * torch.logspace(-spread, spread, k, dtype=torch.float64)[:, None]


def apart(ours: torch.Tensor, theirs: torch.Tensor, rows: torch.Tensor) -> float:
    """Return how far the two combinations lie apart, in units of the gradients' norm."""
    return float(((ours - theirs) @ rows / rows.norm()).abs().max())


@pytest.mark.parametrize(("ours", "theirs"), [("aligned_mtl", "AlignedMTLWeighting"), ("imtl_g", "IMTLGWeighting")])
def test_closed_forms_agree(ours, theirs, rows) -> None:
    G = rows @ rows.T
    assert apart(weights(ours, G), getattr(aggregation, theirs)()(G), rows) <= 1e-6


def test_config_agrees_with_the_pseudo_inverse_of_the_gradients(rows) -> None:
    torch.testing.assert_close(
        weights("config", rows @ rows.T) @ rows, aggregation.ConFIG()(rows), rtol=1e-6, atol=1e-9
    )


def test_pcgrad_of_two_tasks_agrees(rows) -> None:
    G = (rows @ rows.T)[:2, :2]
    assert apart(weights("pcgrad", G), aggregation.PCGradWeighting()(G), rows[:2]) <= 1e-6


def test_gradvac_of_two_tasks_agrees(rows) -> None:
    G = (rows @ rows.T)[:2, :2]
    assert apart(weights("gradvac", G), aggregation.GradVacWeighting(eps=0.0)(G), rows[:2]) <= 1e-6


def test_mgda_is_never_longer(rows) -> None:
    G = rows @ rows.T
    ours = weights("mgda", G)
    theirs = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=2000)(G)
    assert float(ours @ G @ ours) <= float(theirs @ G @ theirs) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_agrees_where_torchjd_converges(alpha, rows) -> None:
    pytest.importorskip("scipy")
    G = rows @ rows.T
    theirs = aggregation.FairGradWeighting(alpha=alpha)(G)
    ours = weights("fairgrad", G, alpha=alpha)

    def residual(a: torch.Tensor) -> float:
        return float((G @ a * a.pow(1 / alpha) - 1).abs().max())

    if residual(theirs) < 1e-7:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert residual(ours) < 1e-7


@pytest.mark.parametrize(("ours", "theirs"), [("upgrad", "UPGradWeighting"), ("dualproj", "DualProjWeighting")])
def test_projections_onto_the_dual_cone_agree(ours, theirs, rows) -> None:
    pytest.importorskip("quadprog")
    pytest.importorskip("qpsolvers")
    from torchjd.linalg import QuadprogProjector

    G = rows @ rows.T
    projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-9)
    assert apart(weights(ours, G), getattr(aggregation, theirs)(projector=projector)(G), rows) <= 1e-6


def test_cagrad_gains_at_least_as_much_for_the_worst_task(rows) -> None:
    pytest.importorskip("cvxpy")
    G = rows @ rows.T
    ours, theirs = weights("cagrad", G), aggregation.CAGradWeighting(c=0.5, norm_eps=0.0)(G)
    assert apart(ours, theirs, rows) <= 1e-4
    assert float((G @ ours).min()) >= float((G @ theirs).min()) - 1e-9 * float(G.trace())


def test_a_torchjd_weighting_is_a_method(rows) -> None:
    G = rows @ rows.T
    expected = aggregation.MGDAWeighting()(G)
    assert torch.equal(weights(aggregation.MGDAWeighting(), G), expected)
    assert torch.equal(weights(aggregation.MGDA(), G), expected)
