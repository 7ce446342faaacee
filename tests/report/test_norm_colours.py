"""The curves of one picture can be told apart, and mean the same in every picture."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from gradwatch.report import ReportData, to_html
from gradwatch.report._svg import NORMS, static_picture
from tensorboard_plugin_gradwatch import STATIC

ROLES = {
    "global_norm": "produced",
    "global_norm_after": "treated",
    "global_norm_applied": "applied",
    "limit": "alarm",
    "clip_limit": "limit",
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])
FAR = 40
"""Of two colours in CIELAB: red and orange are fifty apart, white and black a hundred."""


def themes() -> dict[str, dict[str, str]]:
    """The colours of the roles on a light and on a dark page."""
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    light, dark = style.split("body.gw-dark", 1)
    return {
        name: {role: re.search(rf"--gw-{role}: (#[0-9a-f]{{6}})", part)[1] for role in ROLES.values()}  # type: ignore[index]
        for name, part in (("light", light), ("dark", dark))
    }


def lab(color: str) -> np.ndarray:
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    part = TO_XYZ @ linear / WHITE
    x, y, z = np.where(part > 0.008856, np.cbrt(part), 7.787 * part + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_two_norms_of_one_picture_are_clearly_different_colours(theme: str) -> None:
    colors = themes()[theme]
    near = {
        (a, b): float(np.linalg.norm(lab(colors[a]) - lab(colors[b])))
        for a, b in itertools.combinations(colors, 2)
        if np.linalg.norm(lab(colors[a]) - lab(colors[b])) < FAR
    }
    assert near == {}


def test_the_static_picture_has_the_colours_of_the_page() -> None:
    assert {ROLES[curve.name]: f"#{curve.color}" for curve in NORMS} == themes()["light"]


def treated() -> ReportData:
    """Forty steps, of which 10, 30 and 31 were clipped from 40 to 2."""
    steps, clipped = np.arange(40.0), np.array([10, 30, 31])
    before, after = np.ones(40), np.ones(40)
    before[clipped], after[clipped] = 40.0, 2.0
    scalars = {
        "global_norm": (steps, before),
        "global_norm_after": (steps, after),
        "global_norm_applied": (steps, after),
    }
    scalars["clip_limit"] = steps[clipped], np.full(3, 2.0)
    return ReportData(scalars=scalars, num_steps=40, first_step=0, last_step=39)


def test_a_limit_that_holds_for_single_steps_is_no_line_between_them() -> None:
    picture = static_picture(treated())
    assert picture in to_html(treated())
    (limit,) = (curve for curve in NORMS if curve.name == "clip_limit")
    drawn = re.findall(rf'<path d="([^"]*)" fill="none" stroke="#{limit.color}"', picture)[0]
    # A dot for the one, a stroke for the two.
    assert [part.count("L") for part in drawn.split("M")[1:]] == [0, 1]
    assert "h1" in drawn.split("M")[1]


def test_a_curve_that_lies_on_another_is_drawn_where_it_leaves_it() -> None:
    picture = static_picture(treated())
    paths = {
        curve.name: re.findall(rf'<path d="([^"]*)" fill="none" stroke="#{curve.color}"', picture) for curve in NORMS
    }
    assert paths["global_norm"][0].count("L") == 39
    assert paths["global_norm_after"][0].count("L") == 2 + 3
    assert paths["global_norm_applied"] == []


def test_what_is_not_finite_throughout_is_drawn_too() -> None:
    steps, none = np.arange(40.0), np.full(40, np.nan)
    data = ReportData(
        scalars={"loss": (steps, none), "global_norm": (steps, none)}, num_steps=40, first_step=0, last_step=39
    )
    picture = static_picture(data)
    marks = re.findall(r'<path d="([^"]*)" stroke="#e5002e"', picture)
    assert [mark.count("M") for mark in marks] == [40, 40]
    assert ">loss<" in picture
    assert ">global norm<" in picture
