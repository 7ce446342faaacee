"""The usual research names (those of TransformerLens) for whatever attends, found by trying one forward pass.

The pass is made when a name is asked for that could be one of these, and only once. Where no inputs can be made up for
a model, those of a run that is asked for are taken, or those given to `HookManager.probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .._warn import one_line, unheard
from ..errors import ConfigError
from ._aliases import Unavailable
from ._anatomy import Found, Stack, anatomy
from ._made_up import Inputs, made_up_inputs
from ._names import ModelNames
from ._patterns import Researched
from ._points import HookPoint
from ._trace import Trace, trace

__all__ = ["ResearchNames"]

_IN_BLOCKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
    "ln1.hook_scale",
    "ln2.hook_scale",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_z",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_result",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
)
_OTHERS = (
    "hook_embed",
    "hook_pos_embed",
    "hook_token_type_embed",
    "hook_full_embed",
    "ln_final.hook_normalized",
    "hook_cross_attn_out",
    "ln_cross.hook_normalized",
    "hook_normalized_resid_mid",
    "hook_normalized_resid_post",
)
_LAST_PARTS = frozenset(name.rpartition(".")[2] for name in (*_IN_BLOCKS, *_OTHERS))
_NOTHING_ATTENDS = "nothing attends in it, in a way that is known"
_WILD = "*?]"


class ResearchNames(Researched):
    """The research names of one model as it is now."""

    def __init__(self, names: ModelNames, model: nn.Module) -> None:
        self.known_names, self.model = names, model
        self.stacks: list[Stack] = []
        self._found: dict[str, HookPoint] | None = None
        self._attending: set[str] = set()
        self._has_failed = False

    def names(self, pattern: str = "") -> Mapping[str, HookPoint]:
        if self._found is None:
            roots = self._roots()
            if roots:
                self._found = self._probed(roots)
            elif self.at_hand is not None and "hook_" in pattern:
                self._found = self._probed({"": [self.at_hand]})
        if self._has_failed and self.at_hand is not None:
            # What was made up was no good: what a run is given is.
            self._found = self._probed({"": [self.at_hand]})
        return self._found or {}

    def probe(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Find the names by these inputs.

        Raises:
            ConfigError: the pass fails, or nothing in it attends.
        """
        found = self._probed({"": [(args, kwargs)]})
        if not self._attending:
            reason = next((p.reason for p in found.values()), _NOTHING_ATTENDS)
            raise ConfigError(f"no research names for {type(self.model).__name__}: {reason}.")
        self._found = found

    def may_mean(self, pattern: str) -> bool:
        if "hook" in pattern:
            return True
        tail = pattern[max(pattern.rfind(c) for c in _WILD) + 1 :]
        return tail != pattern and bool(tail) and any(fnmatchcase(last, f"*{tail}") for last in _LAST_PARTS)

    def why_none(self) -> str:
        if self._found is None:
            return "no inputs for it could be made up, and none were given: hooks.probe(inputs)"
        return "" if self._found else _NOTHING_ATTENDS

    def attending(self) -> set[str]:
        self.names()
        torches = {p for p, m in self.known_names.modules.items() if isinstance(m, nn.MultiheadAttention)}
        return self._attending | torches

    def _roots(self) -> dict[str, list[Inputs]]:
        """Return the outermost modules that inputs can be made up for, with these."""
        found: dict[str, list[Inputs]] = {}
        for path, module in self.known_names.modules.items():
            if any(path == root or path.startswith(root + ".") or not root for root in found):
                continue
            try:
                given = made_up_inputs(module)
            except Exception:  # a stack of no layers, a config of its own kind: no inputs can be made up
                given = []
            if given:
                found[path] = given
        return found

    def _probed(self, roots: Mapping[str, list[Inputs]]) -> dict[str, HookPoint]:
        found: dict[str, HookPoint] = {}
        self.stacks, self._has_failed = [], False
        for path, ways in roots.items():
            inside = f"{path}." if path else ""
            module = self.known_names.modules[path]
            try:
                with unheard():
                    _refuse_sharded(module)
                    seen = _tried(module, ways)
                    names, stacks = anatomy(seen, model_name=type(module).__name__)
            except Exception as cause:
                reason = one_line(f"no forward pass of {type(module).__name__} could be tried: {cause!r}", 300)
                names, stacks, self._has_failed = self._all_unavailable(path, reason), [], True
            else:
                self._attending |= {f"{inside}{attend.path}" for attend in seen.attends}
            first = not any(point.available for point in found.values())
            prefix = "" if first else self._prefix(inside, stacks)
            found.update({p.name: p for n, meaning in names.items() if (p := self._point(prefix + n, inside, meaning))})
            for stack in stacks:
                stack.prefix = prefix + stack.prefix
                stack.final_norm = stack.final_norm and inside + stack.final_norm
                stack.unembed = stack.unembed and inside + stack.unembed
            self.stacks += stacks
        return found

    @staticmethod
    def _prefix(inside: str, stacks: list[Stack]) -> str:
        if len(stacks) != 1:
            return inside
        owner = (inside + stacks[0].container).rpartition(".")[0]
        return f"{owner}." if owner else ""

    def _point(self, name: str, inside: str, meaning: Any) -> HookPoint:
        modules = self.known_names.modules
        if isinstance(meaning, Unavailable):
            point = HookPoint("", "output", modules[""], name=name)
            point.reason = meaning.reason
            return point
        assert isinstance(meaning, Found)
        path = f"{inside}{meaning.path}".rstrip(".") if not meaning.path else f"{inside}{meaning.path}"
        point = HookPoint(path, meaning.port, modules[path], name=name)
        point.leaf, point.view, point.writing, point.heads = meaning.leaf, meaning.view, meaning.writing, meaning.heads
        return point

    def _all_unavailable(self, path: str, reason: str) -> dict[str, Unavailable]:
        missing = Unavailable(reason)
        names = dict.fromkeys(("hook_embed", "hook_pos_embed", "ln_final.hook_normalized"), missing)
        try:
            layers = ModelNames(self.known_names.modules[path]).layer_paths()
        except ConfigError:
            layers = []
        names.update({f"blocks.{i}.{name}": missing for i in range(len(layers)) for name in _IN_BLOCKS})
        return names


def _tried(module: nn.Module, ways: list[Inputs]) -> Trace:
    """Return what was seen in a pass with the first inputs that the model takes; raises what the first raised."""
    (args, kwargs), *others = ways
    try:
        return trace(module, args, kwargs)
    except Exception:
        if others:
            with suppress(Exception):
                return _tried(module, others)
        raise


def _refuse_sharded(module: nn.Module) -> None:
    """Raise where a pass would need the other ranks too."""
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        raise ConfigError("its parameters are sharded; make the names before it is")
    if any(type(m).__name__ in ("FullyShardedDataParallel", "DistributedDataParallel") for m in module.modules()):
        raise ConfigError("it is wrapped for distributed training; make the names of the model within")
