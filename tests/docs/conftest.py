"""The fixture of gradwatch's pytest plugin, which a page shows."""

from __future__ import annotations

from gradwatch.testing.plugin import gradwatch_healthy

__all__ = ["gradwatch_healthy"]
