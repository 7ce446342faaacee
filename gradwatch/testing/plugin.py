"""pytest plugin: the fixture `gradwatch_healthy`. Loaded by pytest through its entry point; imports torch when used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["gradwatch_healthy"]


@pytest.fixture
def gradwatch_healthy() -> Callable[..., Any]:
    """Return `gradwatch.testing.assert_healthy`: `gradwatch_healthy(model, batch, loss_fn, optimizer)`."""
    from . import assert_healthy

    return assert_healthy
