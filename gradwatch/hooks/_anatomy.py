"""Names for the parts of a model's blocks, from one traced forward pass: by what came of what, not by class."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from ..torchside import storage_identity
from ._aliases import Unavailable
from ._anatomy_attention import Found, Meanings, attention_names
from ._dataflow import PLAIN, Flow, Route, Step
from ._trace import Attend, Call, Trace
from ._views import Strided

__all__ = ["Found", "Stack", "anatomy"]

_NO_STREAM = "the block's additions to its residual stream could not be followed"
_PARTS = ("hook_attn_out", "hook_mlp_out", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_post")
_NOT_TOLD = "the block adds no such part to its stream by itself (parts may be added up in place before)"
_NO_SCALE = "the norm computes it within one function"


@dataclass
class Stack:
    """One stack of blocks that attend.

    Attributes:
        container: path of the list.
        prefix: of its names.
        blocks: index -> path.
        attends: index -> what attends there.
        final_norm: path, or "".
        unembed: path of what makes logits of the last norm's output, or "".
        logit_scale: what the model multiplies these by.
    """

    container: str
    prefix: str = ""
    blocks: dict[str, str] = None  # type: ignore[assignment]
    attends: dict[str, list[Attend]] = None  # type: ignore[assignment]
    final_norm: str = ""
    unembed: str = ""
    logit_scale: float = 1.0


def anatomy(seen: Trace, *, model_name: str) -> tuple[Meanings, list[Stack]]:
    """Return name -> `Found` or `Unavailable` for all blocks that attend, and the stacks they stand in."""
    stacks = _stacks(seen)
    whole = Flow(seen, seen.calls[0])
    names: Meanings = {}
    for stack in stacks:
        names.update(_around(whole, stack, model_name))
        for index, path in stack.blocks.items():
            # Of a block that is called again one call tells all: the same names hold in each.
            call = next(c for c in seen.calls if c.path == path and c.begin <= stack.attends[index][0].when < c.end)
            attends = [attend for attend in stack.attends[index] if call.begin <= attend.when < call.end]
            for name, meaning in _Block(seen, call, attends).names().items():
                names[f"{stack.prefix}blocks.{index}.{name}"] = meaning
    return names, stacks


def _stacks(seen: Trace) -> list[Stack]:
    found: dict[str, Stack] = {}
    nested = _nested(seen)
    for attend in seen.attends:
        parts = attend.path.split(".")
        depths = [i for i, part in enumerate(parts) if part.isdigit()]
        while len(depths) > 1 and ".".join(parts[: depths[0]]) in nested:
            depths.pop(0)
        if not depths:
            continue
        container, index = ".".join(parts[: depths[0]]), parts[depths[0]]
        stack = found.setdefault(container, Stack(container, "", {}, {}))
        stack.blocks[index] = ".".join(parts[: depths[0] + 1])
        stack.attends.setdefault(index, []).append(attend)
    stacks = list(found.values())
    _name_apart(stacks)
    return stacks


def _nested(seen: Trace) -> set[str]:
    """Return the lists that are of stages, not of blocks: some of what they hold has several like blocks of its own."""
    modules = {call.path: call.module for call in seen.calls}
    within: dict[tuple[str, str, str], dict[str, type]] = {}
    for attend in seen.attends:
        parts = attend.path.split(".")
        depths = [i for i, part in enumerate(parts) if part.isdigit()]
        for outer, inner in pairwise(depths):
            block = ".".join(parts[: inner + 1])
            if block != attend.path and block in modules:
                key = ".".join(parts[:outer]), parts[outer], ".".join(parts[outer:inner])
                within.setdefault(key, {})[block] = type(modules[block])
    return {lists for (lists, _, _), blocks in within.items() if len(blocks) > len(set(blocks.values()))}


def _name_apart(stacks: list[Stack]) -> None:
    """Give each of several stacks a prefix: where its list stands, as far as that tells them apart."""
    owners = []
    for stack in stacks:
        parts = stack.container.split(".")
        owners.append(parts if parts[-1].isdigit() else parts[:-1])
    common = 0
    while len(stacks) > 1 and all(len(o) > common and o[common] == owners[0][common] for o in owners):
        common += 1
    if common and any(o[common : common + 1] and o[common].isdigit() for o in owners):
        common -= 1  # a number alone says nothing
    for stack, owner in zip(stacks, owners, strict=True):
        stack.prefix = "".join(f"{part}." for part in owner[common:]) if len(stacks) > 1 else ""


def _leaf(pairs: list[tuple[str, int]], one: int) -> str | None:
    """Return which leaf a tensor is: None for the only one, "first", or its name."""
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    position = next(i for i, (_, known) in enumerate(pairs) if known == one)
    return "first" if position == 0 else pairs[position][0]


def _output(call: Call | None, one: int, reason: str) -> Found | Unavailable:
    if call is None:
        return Unavailable(reason)
    return Found(call.path, leaf=_leaf(call.outputs, one))


class _Block:
    """One block."""

    def __init__(self, seen: Trace, call: Call, attends: list[Attend]) -> None:
        self.seen, self.call, self.attends = seen, call, attends
        self.flow = Flow(seen, call)
        self.end = call.outputs[0][1]
        needs = self.flow.needs.get(self.end, set())
        width = seen.tensors[self.end].shape
        self.start = next((i for _, i in call.inputs if i in needs and seen.tensors[i].shape == width), None)
        self.steps = [] if self.start is None else self.flow.steps(self.start, self.end) or []

    def names(self) -> Meanings:
        own = self.attends[0]
        known = self.start is not None
        cross = next((a for a in self.attends[1:] if known and not self._from_stream(a)), None)
        found = attention_names(self.flow, own, "attn")
        if cross is not None:
            found.update(attention_names(self.flow, cross, "cross_attn"))
        found.update(self._stream_names(own, cross))
        for norm in ("ln1", "ln2"):
            found[f"{norm}.hook_scale"] = Unavailable(_NO_SCALE)
        return found

    def _from_stream(self, attend: Attend) -> bool:
        return self.start in self.flow.needs.get(attend.k, ())

    def _stream_names(self, own: Attend, cross: Attend | None) -> Meanings:
        if not self.steps or self.start is None:
            names = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
            return {name: Unavailable(_NO_STREAM) for name in names}
        found: Meanings = {"hook_resid_pre": Found(self.call.path, "input", leaf=_leaf(self.call.inputs, self.start))}
        roles = [self._roles(step, own, cross) for step in self.steps]
        for step, role in zip(self.steps, roles, strict=True):
            for addend, what in role:
                emitted = self.flow.emitted(addend, before=self._when(step.total))
                missing = "no module gives out what is added to the residual stream"
                name = {"attn": "hook_attn_out", "cross": "hook_cross_attn_out", "mlp": "hook_mlp_out"}[what]
                found[name] = _output(emitted, addend, missing)
                norm = {"attn": "ln1", "cross": "ln_cross", "mlp": "ln2"}[what] + ".hook_normalized"
                before = self._norm_before(step, addend, norm, found)
                if before is not None:
                    found[norm] = Found(before.path)
                if what == "mlp":
                    found.update(self._mlp_names(addend))
        found.update(self._states(roles))
        for name in _PARTS:
            found.setdefault(name, Unavailable(_NOT_TOLD))
        return found

    def _when(self, one: int) -> int:
        return self.seen.maker[one]

    def _roles(self, step: Step, own: Attend, cross: Attend | None) -> list[tuple[int, str]]:
        """Return (addend, "attn" / "cross" / "mlp")."""
        roles = []
        for addend in step.addends:
            needs = self.flow.needs.get(addend, set())
            before = self.flow.needs.get(step.stream, set())
            what = "mlp"
            if cross is not None and cross.z in needs - before:
                what = "cross"
            elif own.z in needs - before:
                what = "attn"
            roles.append((addend, what))
        return roles

    def _norm_before(self, step: Step, addend: int, name: str, found: Meanings) -> Call | None:
        taken = {meaning.path for key, meaning in found.items() if key.endswith("hook_normalized")}
        needs = self.flow.needs.get(addend, set())
        for call in self.flow.calls:
            if self.flow.is_norm(call) and call.inputs[0][1] == step.stream and call.outputs[0][1] in needs:
                return None if call.path in taken else call
        return None

    def _states(self, roles: list[list[tuple[int, str]]]) -> Meanings:
        found: Meanings = {}
        last = self.steps[-1]
        both = {what for _, what in roles[-1]}
        if both >= {"attn", "mlp"}:
            found["hook_resid_mid"] = Unavailable("attention and MLP read the same state: there is none between them")
        elif len(self.steps) > 1:
            found.update(self._state("mid", self.steps[-2], last.stream))
        if last.norm is not None:
            found.update(self._state("post", last, last.total))
        else:
            found["hook_resid_post"] = Found(self.call.path, leaf=_leaf(self.call.outputs, self.end))
        return found

    def _state(self, which: str, step: Step, after: int) -> Meanings:
        if step.norm is not None:
            path = step.norm.path
            return {f"hook_resid_{which}": Found(path, "input"), f"hook_normalized_resid_{which}": Found(path)}
        one = step.total
        taken = self.flow.taken(one, after=self._when(step.total))
        if taken is None and after != one:  # what goes on is the sum in another shape
            one, taken = after, self.flow.taken(after, after=self._when(step.total))
        if taken is None:
            emitted = self.flow.emitted(step.total)
            return {f"hook_resid_{which}": _output(emitted, step.total, "no module takes or gives the sum")}
        writing = "in_place" if self.flow.num_users(one, taken) else "replace"
        leaf = _leaf(taken.inputs, one)
        return {f"hook_resid_{which}": Found(taken.path, "input", leaf=leaf, writing=writing)}

    def _mlp_names(self, addend: int) -> Meanings:
        down = self.flow.route(addend)
        if down is None or any(op.name not in PLAIN for op in down.ops) or not _is_after(down, self.steps):
            reason = "the MLP's output is no single projection's (a mixture of experts, or a function)"
            return {"mlp.hook_pre": Unavailable(reason), "mlp.hook_post": Unavailable(reason)}
        inside = down.projection.inputs[0][1]
        found: Meanings = {"mlp.hook_post": Found(down.projection.path, "input")}
        one, op = inside, self.flow.op_of(inside)
        while op is not None and op.name in PLAIN and op.name != "chunk":
            one = op.inputs[0]
            op = self.flow.op_of(one)
        factors = [one]
        if op is not None and op.name in ("mul", "__mul__") and len(op.inputs) == 2:
            shapes = {self.seen.tensors[i].shape for i in op.inputs}
            factors = list(op.inputs) if len(shapes) == 1 and self.flow.emitted(one) is None else factors
        routes = [route for factor in factors if (route := self.flow.route(factor)) is not None]
        if len(routes) != len(factors) or any(r.projection is down.projection for r in routes):
            return {**found, "mlp.hook_pre": Unavailable("what goes into the MLP's nonlinearity is no projection's")}
        bent = [any(op.name not in PLAIN for op in route.ops) for route in routes]
        gate = bent.index(True) if True in bent else 0
        found["mlp.hook_pre"] = _part(self.seen, routes[gate])
        if len(routes) == 2:
            found["mlp.hook_pre_linear"] = _part(self.seen, routes[1 - gate])
        return found


def _is_after(down: Route, steps: list[Step]) -> bool:
    return bool(steps) and bool(down.projection.inputs)


def _part(seen: Trace, route: Route) -> Found:
    """Return the part of a projection's output that a route begins with: all of it, or one half."""
    whole = seen.tensors[route.projection.outputs[0][1]]
    for one in route.ids[1:2]:
        part = seen.tensors[one]
        if storage_identity(part)[0] == storage_identity(whole)[0] and part.shape != whole.shape:
            offset = int(part.storage_offset() - whole.storage_offset()) % whole.shape[-1]
            return Found(route.projection.path, view=Strided(None, part.shape[-1], offset, part.shape[-1]))
    return Found(route.projection.path, leaf=_leaf(route.projection.outputs, route.projection.outputs[0][1]))


def _around(whole: Flow, stack: Stack, model_name: str) -> Meanings:
    """Return the names outside the blocks: embeddings and the last norm."""
    p = stack.prefix
    seen = whole.seen
    first = next(c for c in seen.calls if c.path == next(iter(stack.blocks.values())))
    last = next(c for c in seen.calls if c.path == list(stack.blocks.values())[-1])
    found: Meanings = {}
    inside = stack.container.rpartition(".")[0] if p else ""
    for op in seen.ops[: first.begin]:
        if op.name != "embedding" or not _is_within(op.path, inside):
            continue
        name = _embedding_name(seen.tensors[op.inputs[0]])
        found.setdefault(p + name, Found(op.path))
    for name in ("hook_embed", "hook_pos_embed"):
        missing = f"{model_name} holds no embedding that it looks up: hook your own by its path"
        if name == "hook_pos_embed" and p + "hook_embed" in found:
            missing = "the model has no positional embedding: positions enter elsewhere (rotations, biases)"
        found.setdefault(p + name, Unavailable(missing))
    entering = next((i for _, i in first.inputs if seen.tensors[i].is_floating_point()), None)
    emitted = None if entering is None else whole.emitted(entering, before=first.begin)
    if emitted is not None and all(getattr(m, "path", None) != emitted.path for m in found.values()):
        found[p + "hook_full_embed"] = Found(emitted.path, leaf=_leaf(emitted.outputs, entering or 0))
    norm = next(
        (c for c in whole.calls if c.begin >= last.end and whole.is_norm(c) and c.inputs[0][1] == last.outputs[0][1]),
        None,
    )
    if norm is not None:
        stack.final_norm = norm.path
        found[p + "ln_final.hook_normalized"] = Found(norm.path)
        after = [c for c in whole.calls if c.begin >= norm.end and c in whole.projected.values()]
        fed = [c for c in after if c.inputs and whole.is_moved(c.inputs[0][1], norm.outputs[0][1])]
        for call in fed:
            scale = _scale_after(whole, call)
            if scale is not None:
                stack.unembed, stack.logit_scale = call.path, scale
    else:
        found[p + "ln_final.hook_normalized"] = Unavailable(f"{model_name} has no final norm after its blocks")
    return found


def _scale_after(whole: Flow, unembed: Call) -> float | None:
    """Return what the model multiplies a projection's output by to make its logits; 1 where it does something else to
    them, as a soft cap; None where the projection makes no logits."""
    made = unembed.outputs[0][1]
    logits = whole.tensor(made)
    for _, one in whole.call.outputs:
        final = whole.tensor(one)
        if final.shape != logits.shape or whole.ways(one)[0] != {made}:
            continue
        ratios = (final.double() / logits.double())[logits.abs() > logits.abs().mean()]
        exact = 1e-2 if final.dtype.itemsize < 4 else 1e-4
        is_scaled = bool(ratios.numel()) and torch.allclose(ratios, ratios[:1], rtol=exact)
        return float(ratios.mean()) if is_scaled and one != made else 1.0
    return None


def _is_within(path: str, container: str) -> bool:
    return not container or path == container or path.startswith(container + ".") or "." not in path


def _embedding_name(indices: torch.Tensor) -> str:
    """Return what an embedding is of, by its indices: positions count up, types are all alike."""
    rows = indices.reshape(-1, indices.shape[-1])
    if bool((rows == rows[0, 0]).all()):
        return "hook_token_type_embed"
    return "hook_pos_embed" if bool((rows.diff(dim=-1) == 1).all()) else "hook_embed"
