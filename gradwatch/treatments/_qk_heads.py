"""Which rows of which weights make the queries and keys of each attention head."""

# B batch, H heads, K heads of keys, T positions, D width of a head

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..torchside import Pipeline, clean_path, compiled_parts, heads_of, is_flat_sharded, is_within, member, whole_of

__all__ = ["HeadWeights", "Owner", "Part", "owners_of", "rescale_"]

MOST_HEADS = 256

_PAIRS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("q", "k"),
    ("wq", "wk"),
    ("to_q", "to_k"),
    ("q_lin", "k_lin"),
    ("query_proj", "key_proj"),
    ("q_proj_weight", "k_proj_weight"),
)
_FUSED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "to_qkv", "attn_qkv", "in_proj", "W_pack")
"""Names under which modules hold projections, in the libraries at hand."""


class Part(NamedTuple):
    """Rows of one projection's weight and bias, a head of them after another.

    Attributes:
        weight: (out, in), or (in, out) where `axis` is 1.
        bias: (out,); None where there is none.
        rows: numbers among `out`, shape (heads, D).
        axis: of the weight, that `out` lies on.
        offset: of the same rows in the bias.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    axis: int = 0
    offset: int = 0


class HeadWeights(NamedTuple):
    """The weights behind one module's queries (H heads) and keys (K heads, each shared by H / K of queries).

    Attributes:
        extra: further keys that are learned as such, (..., K * D).
    """

    q: Part
    k: Part
    extra: tuple[Tensor, ...] = ()


@dataclass
class Owner:
    """A module that attends, with its projections.

    Attributes:
        weights: once they are known for sure; from the start in `nn.MultiheadAttention`.
        outputs: of the projections, in the call whose queries and keys are to tell which rows belong to which head.
    """

    path: str
    module: nn.Module
    projections: tuple[nn.Module, ...]
    weights: HeadWeights | None = None
    outputs: list[Tensor | None] = field(default_factory=list)

    @property
    def num_heads(self) -> int:
        """Heads of queries, or how many there may be; known before the first forward pass, so that ranks agree."""
        return heads_of(self.module)[0] or MOST_HEADS

    @property
    def names(self) -> str:
        known = {id(child): name for name, child in self.module.named_modules()}
        return " and ".join(known.get(id(projection), "?") for projection in self.projections)

    def settle(self, q_BHTD: Tensor, k_BKTD: Tensor) -> None:
        """Find out, from the queries and keys of a call, which rows are whose. Reads back, once.

        A rotation of positions leaves the length of each query and key as it was: so its rows give it away.

        Raises:
            ValueError: no rows give the like of them (they are normalised, or made in another way).
        """
        if q_BHTD.shape[1] != self.num_heads and (q_BHTD.shape[1] > MOST_HEADS or self.num_heads != MOST_HEADS):
            raise ValueError(f"QKClip: {self.path!r} attends with {q_BHTD.shape[1]} heads, not with {self.num_heads}")
        if self.weights is not None:
            return
        for weights in _candidates(self.projections, q_BHTD.shape[1], q_BHTD.shape[3]):
            if self._gives(weights.q, q_BHTD) and self._gives(weights.k, _once(k_BKTD, len(weights.k.rows))):
                self.weights = weights
                self.outputs = []
                return
        raise ValueError(
            f"QKClip: what {self.names} of {self.path!r} give are not the queries and keys that attend there: they may "
            "be normalised, or laid out in a way that is not known. Leave it out with `paths`"
        )

    def _gives(self, part: Part, heads_BHTD: Tensor) -> bool:
        at = next(i for i, p in enumerate(self.projections) if member_of(p, "weight") is part.weight)
        out = self.outputs[at] if at < len(self.outputs) else None
        if out is None or out.numel() % part.weight.shape[1 if part.axis else 0]:
            return False
        made = out.reshape(-1, out.shape[-1])[:, part.rows.to(out.device)].float().norm(dim=-1)
        seen = heads_BHTD.float().norm(dim=-1).transpose(1, 2).flatten(0, 1)
        if made.shape != seen.shape:
            return False
        # Positions first, then batch, in some models.
        turned = heads_BHTD.float().norm(dim=-1).permute(2, 0, 1).flatten(0, 1)
        return any(_are_alike(made, lengths) for lengths in (seen, turned))


def _are_alike(made: Tensor, seen: Tensor) -> bool:
    """Return whether lengths are the same but for one factor: some models scale their queries."""
    factor = seen.norm() / made.norm()
    return bool(factor.isfinite()) and torch.allclose(made * factor, seen, rtol=0.02, atol=1e-6)


def member_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter that a module holds as such, and not as something computed."""
    found = module._parameters.get(name)
    return found if isinstance(found, Tensor) else None


def _once(k_BHTD: Tensor, heads: int) -> Tensor:
    """Return keys once a group, where each stands in a row for all that share it."""
    return k_BHTD[:, :: k_BHTD.shape[1] // heads] if heads and k_BHTD.shape[1] % heads == 0 else k_BHTD


def owners_of(
    model: nn.Module, patterns: Sequence[str], selects: Callable[[Sequence[str], Sequence[str]], Any]
) -> list[Owner]:
    """Return the modules that attend, with their projections.

    Args:
        model: the whole model.
        patterns: globs over module paths.
        selects: `select_paths`.

    Raises:
        ConfigError: there is none whose projections are known, or one is not to be rescaled: its weights are pieces, or
            it is compiled.
    """
    if isinstance(model, Pipeline):
        raise ConfigError("QKClip: the stages of a pipeline are not rescaled: give it none.")
    modules = {clean_path(path): module for path, module in model.named_modules()}
    owners = [found for path, module in modules.items() if (found := _owner(path, module)) is not None]
    chosen = selects([owner.path for owner in owners], patterns) if owners else []
    owners = [owner for owner, is_chosen in zip(owners, chosen, strict=True) if is_chosen]
    if not owners:
        pairs = ", ".join("/".join(pair) for pair in _PAIRS[:5])
        raise ConfigError(
            f"QKClip: {type(model).__name__} has no attention at {', '.join(patterns)} whose projections of queries "
            f"and keys are known. Looked for nn.MultiheadAttention, and for modules with children {pairs}, ..., or "
            f"{', '.join(_FUSED[:4])}, ... that are linear layers."
        )
    compiled = [clean_path(path) for path in compiled_parts(model)]
    for owner in owners:
        if is_within(owner.path, compiled):
            raise ConfigError(f"QKClip: attention in {owner.path!r} is compiled, and can't be seen there.")
        for p in owner.module.parameters():
            if hasattr(p, "placements") or whole_of(p) is not None or is_flat_sharded(p) or hasattr(p, "ds_id"):
                raise ConfigError(
                    f"QKClip: weights of {owner.path!r} are split over ranks: only whole ones can be rescaled."
                )
    return owners


def _owner(path: str, module: nn.Module) -> Owner | None:
    if isinstance(module, nn.MultiheadAttention):
        return Owner(path, module, (), _of_torch(module))
    for names in _PAIRS:
        pair = [member(module, name) for name in names]
        if all(_is_projection(projection) for projection in pair):
            return Owner(path, module, tuple(pair))
    for name in _FUSED:
        projection = member(module, name)
        if _is_projection(projection):
            return Owner(path, module, (projection,))
    return None


def _is_projection(module: Any) -> bool:
    """Return whether a module is linear, with a weight that it holds as such."""
    if not isinstance(module, nn.Module):
        return False
    weight = member_of(module, "weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _of_torch(module: nn.MultiheadAttention) -> HeadWeights:
    heads, size, bias = module.num_heads, module.embed_dim, module.in_proj_bias
    rows = torch.arange(size, device=module.out_proj.weight.device).view(heads, -1)
    extra = () if module.bias_k is None else (module.bias_k,)
    if module.in_proj_weight is not None:
        weight = module.in_proj_weight
        return HeadWeights(Part(weight, bias, rows), Part(weight, bias, rows + size), extra)
    assert module.q_proj_weight is not None
    assert module.k_proj_weight is not None
    # The biases of queries, keys and values are one, also where the weights are several.
    q, k = Part(module.q_proj_weight, bias, rows), Part(module.k_proj_weight, bias, rows, offset=size)
    return HeadWeights(q, k, extra)


def _candidates(projections: Sequence[nn.Module], heads: int, width: int) -> Iterator[HeadWeights]:
    """Yield the ways in which projections may hold queries and keys of so many heads."""
    parts = [_part_of(projection) for projection in projections]
    if len(parts) == 2:
        q, k = parts
        if _out(q) == heads * width and _out(k) % width == 0:
            yield HeadWeights(_rows(q, heads, width), _rows(k, _out(k) // width, width))
        return
    (whole,) = parts
    total, left = _out(whole), _out(whole) // width - heads
    if total % width or left < 2 or left % 2 or heads % (left // 2):
        return
    few = left // 2
    # All queries, then all keys, then all values; or by groups, with their key and value behind them.
    yield HeadWeights(_rows(whole, heads, width), _rows(whole, few, width, first=heads * width))
    by_group = torch.arange(total, device=whole.weight.device).view(few, heads // few + 2, width)
    q_rows, k_rows = by_group[:, :-2].reshape(heads, width), by_group[:, -2]
    yield HeadWeights(whole._replace(rows=q_rows), whole._replace(rows=k_rows))


def _part_of(projection: nn.Module) -> Part:
    weight = member_of(projection, "weight")
    assert weight is not None
    # Hugging Face's Conv1D holds its weight the other way round.
    axis = int(type(projection).__name__ == "Conv1D")
    return Part(weight, member_of(projection, "bias"), torch.zeros(0, dtype=torch.int64), axis)


def _out(part: Part) -> int:
    return part.weight.shape[part.axis]


def _rows(part: Part, heads: int, width: int, first: int = 0) -> Part:
    rows = torch.arange(first, first + heads * width, device=part.weight.device)
    return part._replace(rows=rows.view(heads, width))


@torch.no_grad()
def rescale_(weights: HeadWeights, gamma_H: Tensor) -> None:
    """Multiply the logits of each head by a factor, through the weights: those of queries and of keys by its root.

    Keys that several heads share are multiplied by the root of the smallest of their factors, and queries by what is
    left; so the logits of each head change by its own factor alone. Weights whose factor is 1 keep every bit.
    """
    few = len(weights.k.rows)
    gamma_KG = gamma_H.view(few, -1)
    k_factors = gamma_KG.amin(dim=1).sqrt()
    q_factors = (gamma_KG / k_factors[:, None]).reshape(-1)
    parts = ((weights.q, q_factors), (weights.k, k_factors))
    if weights.q.weight is weights.k.weight:
        _scale_rows(weights.q.weight, parts, weights.q.axis)
    else:
        for part, factors in parts:
            _scale_rows(part.weight, [(part, factors)], part.axis)
    biases = {id(part.bias): part.bias for part, _ in parts if part.bias is not None}
    for bias in biases.values():
        moved_rows = [(p._replace(rows=p.rows + p.offset), f) for p, f in parts if p.bias is bias]
        _scale_rows(bias, moved_rows, 0)
    for keys in weights.extra:
        keys.view(-1, few, keys.shape[-1] // few).mul_(k_factors.to(keys.device, keys.dtype)[:, None])


def _scale_rows(tensor: Tensor, parts: Sequence[tuple[Part, Tensor]], axis: int) -> None:
    each = torch.ones(tensor.shape[axis], dtype=parts[0][1].dtype, device=parts[0][1].device)
    for part, factors in parts:
        each[part.rows.to(each.device).reshape(-1)] = factors.repeat_interleave(part.rows.shape[1])
    each = each.to(tensor.device, tensor.dtype)
    tensor.mul_(each if axis or tensor.dim() == 1 else each[:, None])
