"""The two-objective toy of the CAGrad paper, whose plain mean gets stuck in narrow valleys."""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.treatments.surgery import weights

STARTS = [(-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)]
# Mean of the two losses after 100,000 steps of Adam at 1e-3.
FINALS = {
    "mean": (3.555, -15.0916, 2.073),
    "cagrad": (-15.0916, -15.0916, -15.0916),
    "pcgrad": (-13.9332, -10.9365, -14.5926),
}


def losses_and_gradients(x1: float, x2: float) -> tuple[float, float, tuple[float, float], tuple[float, float]]:
    """Liu et al., arXiv 2110.14048, appendix B, with gradients by hand."""
    t = math.tanh(-x2)
    slope = -(1 - t * t)

    def valley(u: float, du1: float, du2: float) -> tuple[float, float, float]:
        if abs(u) < 5e-6:
            return math.log(5e-6) + 6, 0.0, 0.0
        return math.log(abs(u)) + 6, du1 / u, du2 / u

    l1, a1, b1 = valley(0.5 * (-x1 - 7) - t, -0.5, -slope)
    l2, a2, b2 = valley(0.5 * (-x1 + 3) + t + 2, -0.5, slope)
    th = math.tanh(x2 * 0.5)
    c1, c2 = max(th, 0.0), max(-th, 0.0)
    dc1 = 0.5 * (1 - th * th) if th >= 0 else 0.0
    dc2 = -0.5 * (1 - th * th) if th <= 0 else 0.0
    bowl = 0.1 * (-x2 - 8) ** 2
    q1, q2 = ((-x1 + 7) ** 2 + bowl) / 10 - 20, ((-x1 - 7) ** 2 + bowl) / 10 - 20
    dq2 = -0.2 * (-x2 - 8) / 10
    g1 = (a1 * c1 - 2 * (-x1 + 7) / 10 * c2, b1 * c1 + l1 * dc1 + dq2 * c2 + q1 * dc2)
    g2 = (a2 * c1 - 2 * (-x1 - 7) / 10 * c2, b2 * c1 + l2 * dc1 + dq2 * c2 + q2 * dc2)
    return l1 * c1 + q1 * c2, l2 * c1 + q2 * c2, g1, g2


def run(method: str, start: tuple[float, float], steps: int) -> float:
    """Return the mean loss after Adam at 1e-3 on the combined gradient.

    In the valleys rounding decides where a stuck run ends: the order of operations is part of the anchor.
    """
    options = {"rescale": "length"} if method == "cagrad" else {}
    factor = 0.5 if method == "pcgrad" else 1.0
    (x1, x2), m1, m2, v1, v2 = start, 0.0, 0.0, 0.0, 0.0
    b1, b2, p1, p2 = 0.9, 0.999, 1.0, 1.0
    for _ in range(steps):
        _, _, g, h = losses_and_gradients(x1, x2)
        a, m, d = g[0] * g[0] + g[1] * g[1], g[0] * h[0] + g[1] * h[1], h[0] * h[0] + h[1] * h[1]
        A = B = 0.5
        if method != "mean" and a > 0 and d > 0:
            gramian = torch.tensor([[a, m], [m, d]], dtype=torch.float64)
            A, B = (factor * w for w in weights(method, gramian, **options).tolist())
        u1, u2 = A * g[0] + B * h[0], A * g[1] + B * h[1]
        p1, p2 = p1 * b1, p2 * b2
        m1, m2 = b1 * m1 + (1 - b1) * u1, b1 * m2 + (1 - b1) * u2
        v1, v2 = b2 * v1 + (1 - b2) * u1 * u1, b2 * v2 + (1 - b2) * u2 * u2
        x1 -= 1e-3 * (m1 / (1 - p1)) / (math.sqrt(v1 / (1 - p2)) + 1e-8)
        x2 -= 1e-3 * (m2 / (1 - p1)) / (math.sqrt(v2 / (1 - p2)) + 1e-8)
    first, second, _, _ = losses_and_gradients(x1, x2)
    return (first + second) / 2


def test_gradients_by_hand_are_those_of_autograd() -> None:
    for x1, x2 in [*STARTS, (0.3, -2.0)]:
        _, _, g1, g2 = losses_and_gradients(x1, x2)
        for index, g in enumerate((g1, g2)):
            for axis in range(2):
                ahead, behind = [x1, x2], [x1, x2]
                ahead[axis] += 1e-6
                behind[axis] -= 1e-6
                slope = (losses_and_gradients(*ahead)[index] - losses_and_gradients(*behind)[index]) / 2e-6
                assert g[axis] == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "start"), [("mean", 0), ("mean", 1), ("mean", 2), ("cagrad", 0), ("pcgrad", 2)])
def test_toy_ends_where_the_method_is_known_to_end(method, start) -> None:
    assert run(method, STARTS[start], 100_000) == pytest.approx(FINALS[method][start], abs=1e-2)
