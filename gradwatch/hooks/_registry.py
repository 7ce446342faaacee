"""Which hooks of a manager sit where: all-or-nothing attaching, exact removal, one lock."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .._warn import warn
from ..errors import ConfigError
from ..torchside import WeakHook, compiled_parts, is_within, takes_hooks, weakly
from ._attention import AttentionSite
from ._dispatch import Site
from ._hook import Entry, Hook
from ._parameters import ParameterSite
from ._results import ResultSite
from ._runs import Run, Runs

__all__ = ["Registry"]

AnySite = Site | ParameterSite | AttentionSite | ResultSite
_KINDS: dict[str, Any] = {"parameter": ParameterSite, "module": Site, "result": ResultSite}


class Registry:
    """Owns every torch handle of one manager, and removes these alone."""

    def __init__(self, model: nn.Module, runs: Runs) -> None:
        self.model, self.runs = model, runs
        self.lock = threading.RLock()
        self.hooks: dict[str, Hook] = {}
        # While hooks are on the model they keep their manager, which its user may have let go of.
        self.owner: Any = None
        self.manager: weakref.ref[Any] | None = None
        self._kept: list[tuple[Run, Entry]] = []
        self.sites: dict[tuple[str, int], AnySite] = {}
        # Without a hook at present: to make one anew for each run costs as much as torch's own hook.
        self._idle: dict[tuple[str, int], Site] = {}
        self._root_handle: Any = None
        self._order = 0
        self._last_number = 0
        self._released: weakref.WeakSet[Hook] = weakref.WeakSet()
        runs.on_threaded = weakly(self.refresh_all)

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
            try:
                hook.attached = True
                for entry in hook.entries:
                    self._site(entry).entries.append(entry)
                self.hooks[hook.id] = hook
                self.owner = None if self.manager is None else self.manager()
                self.refresh(hook)
                if hook.options.prepend:
                    self._to_front(hook)
            except BaseException:
                self.detach([hook])
                raise

    def detach(self, hooks: Iterable[Hook]) -> None:
        """Take hooks off for good, in graphs that exist already too. All of them, whatever else fails."""
        with self.lock:
            for hook in hooks:
                hook.alive = False
                self._unlink(hook)

    def keep(self, entry: Entry) -> None:
        """Keep what the checkpoints of the present pass will need and can't keep themselves, till the next pass."""
        with self.lock:
            self._kept = [(run, known) for run, known in self._kept if run is self.runs.run]
            self._kept.append((self.runs.run, entry))

    def forget_kept(self) -> None:
        self._kept.clear()

    def replay(self, entries: Iterable[Entry], *, on: bool) -> None:
        """Put hooks back for the repetition of a forward in which they acted, or take them off again."""
        with self.lock:
            touched: dict[tuple[str, int], AnySite] = {}
            for entry in entries:
                site: Any = self._site(entry)
                (site.replayed.append if on else site.replayed.remove)(entry)
                touched[entry.site] = site
            for key, site in touched.items():
                self._fit_site(key, site)

    def counts_from(self, calls: Mapping[tuple[str, int], int]) -> dict[int, int]:
        """Return where the sites that are at these places now begin to count, so that the next calls have these
        numbers: a site that was taken off in between is another one."""
        counts: dict[int, int] = {}
        for place, call in calls.items():
            site: Any = self.sites.get(place)
            for part in (site, getattr(site, "front", None)):
                if part is not None:
                    counts[part.key] = call
        return counts

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
            key = entry.site
            site = self.sites.get(key)
            if site is None or entry not in site.entries:
                continue
            site.entries.remove(entry)
            self._fit_site(key, site)
        hook.settle()
        self._fit_root()
        if not self.sites:
            self.owner = None

    def _fit_site(self, key: tuple[str, int], site: Any) -> None:
        if site.entries or site.replayed:
            site.refresh()
            return
        site.take_off()
        self.sites.pop(key, None)
        if type(site) is Site and site.can_rest:
            site.lay_down()
            self._idle[key] = site

    def forget_idle(self) -> None:
        """Let go of the sites without hooks: modules have come or gone."""
        self._idle.clear()

    def _to_front(self, hook: Hook) -> None:
        for entry in hook.entries:
            site = self.sites.get(entry.site)
            if isinstance(site, Site):
                site.to_front()

    def close(self) -> None:
        """Take everything off and silence it, in graphs that exist already too."""
        self.detach(list(self.hooks.values()))
        self.silence()
        self.forget_idle()

    def refresh(self, hook: Hook) -> None:
        """Make torch's hooks fit: the hook was attached, enabled or disabled."""
        with self.lock:
            for entry in hook.entries:
                site = self.sites.get(entry.site)
                if site is not None:
                    site.refresh()
            if any(entry.spot.is_parameter for entry in hook.entries):
                self.fit_waiting()
            self._fit_root()

    def fit_waiting(self) -> None:
        """Hang what waits for its parameter to require a gradient (it is thawed later); look again at the next pass."""
        with self.lock:
            waiting = [site for site in self.sites.values() if isinstance(site, ParameterSite) and site.waits]
            for site in waiting:
                site.refresh()
            self.runs.on_begin = weakly(self.fit_waiting) if any(site.waits for site in waiting) else None

    def refresh_all(self) -> None:
        with self.lock:
            for site in self.sites.values():
                site.refresh()

    def _site(self, entry: Entry) -> AnySite:
        key, point = entry.site, entry.spot
        site: Any = self.sites.get(key)
        if site is None:
            site = self._idle.pop(key, None)
            if site is not None and site.module is point.target:
                site.wake(self)
            else:
                site = _KINDS.get(key[0], AttentionSite)(point.path, point.target, self.runs, self)
            self.sites[key] = site
        return site

    def _fit_root(self) -> None:
        """Know when a forward pass begins: by a pre-hook on the root."""
        active = any(e.hook.is_enabled for site in self.sites.values() for e in site.entries)
        wanted = bool(active or self.runs.listeners)
        if wanted and self._root_handle is None and takes_hooks(self.model):
            self._root_handle = WeakHook.of(self.runs.begin, keeps_owner=True).hang(
                self.model.register_forward_pre_hook, prepend=True
            )
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

    def warn_of_compiled(self, hook: Hook) -> None:
        """Say, each time that a hook is added to stay, that it may be on a module that torch.compile has taken."""
        compiled = compiled_parts(self.model)
        parts = [p for p in compiled if any(is_within(entry.spot.path, [p]) for entry in hook.entries)]
        if parts:
            warn(
                f"{type(self.model).__name__} is compiled ({', '.join(map(repr, parts[:3]))}): a hook added after its "
                "first run may be ignored without a word. Add hooks before the first run, hook the uncompiled "
                "model, or call torch.compiler.reset() after adding; coverage() tells which hooks fired.",
                stacklevel=4,
            )
