"""What a model's output is made of: the residual stream taken apart, and what each part says for a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnavailablePointError
from ._norms import norm_of
from ._results import head_results, weight_of

if TYPE_CHECKING:
    from ._cache import Cache
    from ._points import HookPoint

__all__ = ["Residual", "ResidualReading", "sliced"]


class Residual:
    """The residual stream of one run, as its cache holds it: `cache.residual()`.

    Parts are (parts, batch, positions, width). Without a final norm, or an unembedding that follows it, there are no
    logits to attribute.
    """

    def __init__(self, cache: Cache, *, prefix: str = "") -> None:
        self.cache, self.prefix = cache, prefix
        resolver = cache._resolver
        self.names = resolver.aliases
        self.modules = resolver.names.modules
        blocks = f"{prefix}blocks."
        found = {n.removeprefix(blocks).split(".")[0] for n in self.names if n.startswith(blocks)}
        self.layers = sorted(int(i) for i in found if i.isdigit())
        if not self.layers:
            others = sorted({n[: n.index("blocks.")] for n in self.names if "blocks." in n})
            if others:
                shown = " or ".join(f"prefix={other!r}" for other in others)
                raise ConfigError(f"the model has no blocks under the prefix {prefix!r}. Its stacks: {shown}.")
            raise ConfigError("the model has no research names of blocks: nothing to take apart.")

    def _name(self, layer: int, what: str) -> str:
        return f"{self.prefix}blocks.{layer}.{what}"

    def _at(self, layer: int | None) -> int:
        """Return how many of the blocks that have names stand before a layer; None and -1 mean all."""
        most = self.layers[-1] + 1
        if layer is None or layer == -1:
            return len(self.layers)
        if not 0 <= layer <= most:
            raise ConfigError(f"`layer` is a number of blocks from 0 to {most}, or -1. Got {layer}.")
        return sum(known < layer for known in self.layers)

    def parts(
        self, layer: int | None = None, *, mlp_input: bool = False, mode: str = "all"
    ) -> tuple[Tensor, list[str]]:
        """Return what adds up to the stream before a layer (or, with `mlp_input`, before its MLP), and labels.

        Args:
            layer: blocks before it count; None for all.
            mlp_input: the layer's own attention counts too.
            mode: "all", or the parts of "attn" or "mlp" alone.
        """
        if mode not in ("all", "attn", "mlp"):
            raise ConfigError(f"`mode` is 'all', 'attn' or 'mlp'. Got {mode!r}.")
        number = self._at(layer)
        found: list[Tensor] = []
        labels: list[str] = []
        if mode == "all":
            found, labels = self._embeddings()
        for place, i in enumerate(self.layers[: number + mlp_input]):
            if mode == "all" and place:
                self._bridge(found, labels, self.layers[place - 1], i)
            for kind in ("attn", "mlp"):
                if mode in ("all", kind) and not (kind == "mlp" and place == number):
                    found.append(self.cache[self._name(i, f"hook_{kind}_out")].reshape(self._shape()))
                    labels.append(f"{i}_{kind}_out")
            if mode == "all" and place != number:
                self._check(found, i)
        if mode == "all" and not mlp_input and 0 < number < len(self.layers):
            self._bridge(found, labels, self.layers[number - 1], self.layers[number])
        if not found:
            raise ConfigError(f"no block stands before layer {layer}: there are no parts.")
        return torch.stack(found), labels

    def _held(self, layer: int, what: str) -> Tensor | None:
        name = self._name(layer, what)
        return self.cache[name].reshape(self._shape()) if name in self.cache else None

    def _bridge(self, found: list[Tensor], labels: list[str], before: int, after: int) -> None:
        """Add what blocks that have no names (that do not attend) put between two that have."""
        left, entered = self._held(before, "hook_resid_post"), self._held(after, "hook_resid_pre")
        if left is not None and entered is not None and after - before > 1:
            found.append(entered - left)
            labels.append(f"{before + 1}_to_{after}_pre")

    def _check(self, found: list[Tensor], layer: int) -> None:
        """See that the parts are the stream after a block, where that was kept.

        Raises:
            ConfigError: they are not: the model normalises the stream itself between its additions.
        """
        post = self._held(layer, "hook_resid_post")
        total = torch.stack(found).sum(dim=0)
        slack = max(1e-3, 64 * torch.finfo(total.dtype).eps)
        if post is not None and float((total - post).abs().max()) > slack * float(post.abs().max()):
            raise ConfigError(
                f"the parts do not add up to {self._name(layer, 'hook_resid_post')!r}: the model changes its residual "
                "stream between additions (a norm after each, a scale), so what is added early is not there as it was"
            )

    def _shape(self) -> torch.Size:
        shape: torch.Size = self.cache[self._name(self.layers[0], "hook_resid_pre")].shape
        return shape

    def _embeddings(self) -> tuple[list[Tensor], list[str]]:
        """Return embeddings, where the model adds them up as they are; else the first state as one part."""
        first = self.cache[self._name(self.layers[0], "hook_resid_pre")]
        kinds = ("hook_embed", "hook_pos_embed", "hook_token_type_embed")
        held = {n: self.cache[self.prefix + n] for n in kinds if self.prefix + n in self.cache}
        names = [n for n, tensor in held.items() if tensor.shape[-1] == first.shape[-1]]
        found = [held[n].expand_as(first) for n in names]
        if found and torch.allclose(torch.stack(found).sum(dim=0), first, atol=1e-5):
            return found, [name.removeprefix("hook_") for name in names]
        return [first], ["embed" if self.layers[0] == 0 else f"{self.layers[0]}_pre"]

    def states(self, layer: int | None = None, *, incl_mid: bool = False) -> tuple[Tensor, list[str]]:
        """Return the stream before each block up to a layer, and after the last; between attention and MLP too."""
        number = self._at(layer)
        found, labels = [], []
        for i in self.layers[:number]:
            for what in ("pre", "mid") if incl_mid else ("pre",):
                found.append(self.cache[self._name(i, f"hook_resid_{what}")].reshape(self._shape()))
                labels.append(f"{i}_{what}")
        if number == len(self.layers):
            found.append(self.cache[self._name(self.layers[-1], "hook_resid_post")])
            labels.append("final_post")
        else:
            found.append(self.cache[self._name(self.layers[number], "hook_resid_pre")])
            labels.append(f"{self.layers[number]}_pre")
        return torch.stack(found), labels

    def heads(self, layer: int | None = None, *, incl_remainder: bool = False) -> tuple[Tensor, list[str]]:
        """Return what each head of the layers before one adds to the stream, and labels: `L0H0`, ...

        From `attn.hook_result` where it was kept, else from `attn.hook_z` and the projection's weight.
        """
        found: list[Tensor] = []
        labels: list[str] = []
        for i in self.layers[: self._at(layer)]:
            results = self._results(i)
            found += list(results.unbind(dim=2))
            labels += [f"L{i}H{head}" for head in range(results.shape[2])]
        if not found and not incl_remainder:
            raise ConfigError(f"no block stands before layer {layer}: there are no heads.")
        if incl_remainder:
            state = self.states(layer)[0][-1]
            found.append(state - torch.stack(found).sum(dim=0) if found else state)
            labels.append("remainder")
        return torch.stack(found), labels

    def _results(self, layer: int) -> Tensor:
        name = self._name(layer, "attn.hook_result")
        if name in self.cache:
            return self.cache[name]
        point = self._point(name)
        z = self.cache[self._name(layer, "attn.hook_z")].flatten(-2)
        module: Any = point.target
        output = self.cache.get(f"{point.path}:output", None)
        if isinstance(module, nn.Linear):
            return head_results(z, module.weight, point.heads or 1)
        weight = None if output is None else weight_of(module, (z,), output)
        if weight is None:
            raise ConfigError(f"{name!r} is not in the cache: ask for it with points=.")
        return head_results(z, weight, point.heads or 1)

    def _point(self, name: str) -> HookPoint:
        point = self.names[name]
        if not point.available:
            raise UnavailablePointError(name, point.reason)
        return point

    def normalised(
        self, parts: Tensor, layer: int | None = None, *, mlp_input: bool = False, pos_slice: Any = None
    ) -> Tensor:
        """Return parts as the norm before a layer has them: centred where it centres, by the scale that it had here.

        The norm of a sum is then the sum of these, but for its bias.

        Args:
            parts: (..., batch, positions, width).
            layer: whose norm; None for the final one.
            mlp_input: the norm before its MLP.
            pos_slice: the positions that the parts are of.
        """
        number = self._at(layer)
        if number == len(self.layers):
            point = self._point(f"{self.prefix}ln_final.hook_normalized")
            state = self.cache[self._name(self.layers[-1], "hook_resid_post")]
        else:
            block = self.layers[number]
            point = self._point(self._name(block, f"ln{1 + mlp_input}.hook_normalized"))
            state = self.cache[self._name(block, f"hook_resid_{'mid' if mlp_input else 'pre'}")]
        state = sliced(state.reshape(self._shape()), pos_slice)
        gain, eps, centred = norm_of(point.target, parts.shape[-1])
        if centred:
            parts = parts - parts.mean(dim=-1, keepdim=True)
            state = state - state.mean(dim=-1, keepdim=True)
        scale = (state.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        return parts * scale.to(parts.dtype) * gain.to(parts.dtype)

    def logits(self, parts: Tensor, tokens: Any, incorrect: Any = None, *, pos_slice: Any = None) -> Tensor:
        """Return what each part adds to the logit of a token (less that of another): (parts, batch, positions).

        Args:
            parts: (parts, batch, positions, width), not yet normalised.
            tokens: one for all, or one for each row of the batch, or (batch, positions).
            incorrect: likewise.
            pos_slice: the positions that the parts are of.
        """
        weight = self._unembedding()
        direction = _rows(weight, tokens)
        if incorrect is not None:
            direction = direction - _rows(weight, incorrect)
        return (self.normalised(parts, pos_slice=pos_slice) * direction).sum(dim=-1)

    def _unembedding(self) -> Tensor:
        researched: Any = self.cache._resolver.researched
        for stack in getattr(researched, "stacks", ()):
            if stack.prefix == self.prefix and stack.unembed:
                weight: Tensor = self.modules[stack.unembed].weight  # type: ignore[assignment]
                return weight.detach() * stack.logit_scale
        raise ConfigError("no projection of the final norm's output makes logits in this model.")


def _rows(weight: Tensor, tokens: Any) -> Tensor:
    """Return the directions of tokens, so that they fit (batch, positions, width)."""
    chosen = torch.as_tensor(tokens, device=weight.device)
    rows = weight[chosen]
    return rows[:, None] if chosen.dim() == 1 else rows


def sliced(tensor: Tensor, pos_slice: Any) -> Tensor:
    """Return some positions of (..., positions, width); one by number leaves no dimension of positions."""
    if pos_slice is None:
        return tensor
    where = pos_slice if isinstance(pos_slice, (int, slice)) else torch.as_tensor(pos_slice, device=tensor.device)
    return tensor[..., where, :]


class ResidualReading:
    """What a cache says of the residual stream, under the names that TransformerLens has for it."""

    def residual(self, *, prefix: str = "") -> Residual:
        """Return the residual stream of the run; `prefix` where a model has several: `"decoder."`."""
        return Residual(cast("Cache", self), prefix=prefix)

    def decompose_resid(
        self, layer: int | None = None, *, mlp_input: bool = False, mode: str = "all", **options: Any
    ) -> Any:
        """Return what adds up to the stream before a layer: (parts, batch, positions, width).

        Args:
            layer: blocks before it count; None or -1 for all.
            mlp_input: its attention counts too.
            mode: "all", "attn" or "mlp".
            **options: `return_labels`, `apply_ln`, `pos_slice`, `prefix`.
        """
        residual = self.residual(prefix=options.pop("prefix", ""))
        return _given(residual, residual.parts(layer, mlp_input=mlp_input, mode=mode), layer, mlp_input, **options)

    def accumulated_resid(self, layer: int | None = None, *, incl_mid: bool = False, **options: Any) -> Any:
        """Return the stream before each block up to a layer, and after the last: (states, batch, positions, width).

        Args:
            layer: as for `decompose_resid`.
            incl_mid: between attention and MLP too.
            **options: as for `decompose_resid`.
        """
        residual = self.residual(prefix=options.pop("prefix", ""))
        return _given(residual, residual.states(layer, incl_mid=incl_mid), layer, False, **options)

    def stack_head_results(self, layer: int | None = None, *, incl_remainder: bool = False, **options: Any) -> Any:
        """Return what each head before a layer adds to the stream: (heads, batch, positions, width).

        Args:
            layer: as for `decompose_resid`.
            incl_remainder: what else makes up the stream, as one more part.
            **options: as for `decompose_resid`.
        """
        residual = self.residual(prefix=options.pop("prefix", ""))
        return _given(residual, residual.heads(layer, incl_remainder=incl_remainder), layer, False, **options)

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        *,
        mlp_input: bool = False,
        pos_slice: Any = None,
        prefix: str = "",
    ) -> Tensor:
        """Return parts as the norm before a layer (by default the final one) has them, by the scale that it had here.

        The norm's gain is in it, its bias is not: parts of the whole stream add up to the norm's output less its bias.

        Args:
            residual_stack: (parts, batch, positions, width).
            layer: whose norm; None or -1 for the final one.
            mlp_input: the norm before its MLP.
            pos_slice: the positions that the parts are of.
            prefix: of the stack's names.
        """
        residual = self.residual(prefix=prefix)
        return residual.normalised(residual_stack, layer, mlp_input=mlp_input, pos_slice=pos_slice)

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        *,
        pos_slice: Any = None,
        prefix: str = "",
    ) -> Tensor:
        """Return what each part adds to the logit of a token, or to its difference from another's.

        Args:
            residual_stack: (parts, batch, positions, width), not yet normalised.
            tokens: one for all, one for each row of the batch, or (batch, positions).
            incorrect_tokens: likewise.
            pos_slice: the positions that the parts are of.
            prefix: of the stack's names.

        Returns:
            (parts, batch, positions). With the scale that the model gives its logits; before a soft cap on them.
        """
        residual = self.residual(prefix=prefix)
        return residual.logits(residual_stack, tokens, incorrect_tokens, pos_slice=pos_slice)


def _given(
    residual: Residual,
    found: tuple[Tensor, list[str]],
    layer: int | None,
    mlp_input: bool,
    *,
    return_labels: bool = False,
    apply_ln: bool = False,
    pos_slice: Any = None,
) -> Any:
    parts, labels = found
    parts = residual.normalised(parts, layer, mlp_input=mlp_input) if apply_ln else parts
    parts = sliced(parts, pos_slice)
    return (parts, labels) if return_labels else parts
