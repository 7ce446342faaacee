"""Which hooks of a manager sit where: all-or-nothing attaching, exact removal, one lock."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ConfigError, GradwatchWarning
from ._dispatch import Site
from ._hook import Hook
from ._parameters import ParameterSite
from ._points import HookPoint
from ._runs import Runs

__all__ = ["Registry", "compiled_parts"]


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the paths of modules that torch.compile has taken, by wrapping or in place."""
    return [
        path
        for path, module in model.named_modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]


class Registry:
    """Owns every torch handle of one manager, and removes these alone."""

    def __init__(self, model: nn.Module, runs: Runs) -> None:
        self.model, self.runs = model, runs
        self.lock = threading.RLock()
        self.hooks: dict[str, Hook] = {}
        self.sites: dict[tuple[bool, int], Site | ParameterSite] = {}
        self._root_handle: Any = None
        self._order = 0
        self._last_number = 0
        self._warned = False
        self._released: weakref.WeakSet[Hook] = weakref.WeakSet()
        runs.on_threaded = self.refresh_all

    def new_id(self, wanted: str | None) -> str:
        if wanted is None:
            self._last_number += 1
            while f"hook-{self._last_number}" in self.hooks:
                self._last_number += 1
            return f"hook-{self._last_number}"
        if wanted in self.hooks:
            raise ConfigError(f"there is a hook {wanted!r} already, at {self.hooks[wanted].points[0]}. Ids are unique.")
        return wanted

    def attach(self, hook: Hook) -> None:
        """Attach a hook at all its points, or at none."""
        with self.lock:
            self._order += 1
            hook.order = -self._order if hook.options.prepend else self._order
            self._warn_of_compiled()
            try:
                for entry in hook.entries:
                    self._site(entry.spot).entries.append(entry)
                self.hooks[hook.id] = hook
                self.refresh(hook)
            except BaseException:
                self.detach([hook])
                raise

    def detach(self, hooks: Iterable[Hook]) -> None:
        """Take hooks off for good, in graphs that exist already too. All of them, whatever else fails."""
        with self.lock:
            for hook in hooks:
                hook.alive = False
                self._unlink(hook)

    def release(self, hooks: Iterable[Hook]) -> None:
        """Take hooks off the model, but let them act in the graphs that they were placed in."""
        with self.lock:
            for hook in hooks:
                self._unlink(hook)
                self._released.add(hook)

    def silence(self) -> None:
        """End what lives on in graphs of hooks that were released."""
        for hook in tuple(self._released):
            hook.alive = False

    def _unlink(self, hook: Hook) -> None:
        if self.hooks.get(hook.id) is hook:
            del self.hooks[hook.id]
        for entry in hook.entries:
            key = self._key(entry.spot)
            site = self.sites.get(key)
            if site is None or entry not in site.entries:
                continue
            site.entries.remove(entry)
            if site.entries:
                site.refresh()
            else:
                site.take_off()
                del self.sites[key]
        self._fit_root()

    def refresh(self, hook: Hook) -> None:
        """Make torch's hooks fit: the hook was attached, enabled or disabled."""
        with self.lock:
            for entry in hook.entries:
                site = self.sites.get(self._key(entry.spot))
                if site is not None:
                    site.refresh()
            self._fit_root()

    def refresh_all(self) -> None:
        with self.lock:
            for site in self.sites.values():
                site.refresh()

    @staticmethod
    def _key(point: HookPoint) -> tuple[bool, int]:
        return (point.is_parameter, id(point.target))

    def _site(self, point: HookPoint) -> Site | ParameterSite:
        key = self._key(point)
        if key not in self.sites:
            kind: Any = ParameterSite if point.is_parameter else Site
            self.sites[key] = kind(point.path, point.target, self.runs)
        return self.sites[key]

    def _fit_root(self) -> None:
        """Know when a forward pass begins: by a pre-hook on the root, or within its only output hook."""
        active = [site for site in self.sites.values() if any(e.hook.is_enabled for e in site.entries)]
        root = active[0] if len(active) == 1 and active[0].path == "" else None
        alone = isinstance(root, Site) and not (root.inputs or root.input_gradients or root.full_hooks)
        alone = alone and not self.runs.listeners
        for site in active:
            if isinstance(site, Site) and site.begins != (alone and site is root):
                site.begins = alone and site is root
                site.refresh()
        wanted = bool(active or self.runs.listeners) and not alone
        if wanted and self._root_handle is None:
            self._root_handle = self.model.register_forward_pre_hook(self.runs.begin, prepend=True)
        elif not wanted and self._root_handle is not None:
            self._root_handle.remove()
            self._root_handle = None

    def listen(self, listener: Any, *, on: bool) -> None:
        """Call `listener(step)` whenever a forward pass begins, or no longer."""
        with self.lock:
            if on:
                self.runs.listeners.append(listener)
            elif listener in self.runs.listeners:
                self.runs.listeners.remove(listener)
            self._fit_root()

    def _warn_of_compiled(self) -> None:
        parts = [] if self._warned else compiled_parts(self.model)
        if parts:
            self._warned = True
            warnings.warn(
                f"{type(self.model).__name__} is compiled ({', '.join(map(repr, parts[:3]))}): a hook added after its "
                "first run may be ignored without a word. Add hooks before the first run, hook the uncompiled "
                "model, or call torch.compiler.reset() after adding; coverage() tells which hooks fired.",
                GradwatchWarning,
                stacklevel=5,
            )
