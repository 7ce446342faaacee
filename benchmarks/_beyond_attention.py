"""Attention's largest logits against float64, QK-Clip at its limit, and what both cost a step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.attention import AttentionScores
from gradwatch.treatments import QKClip

__all__ = ["rows"]

HEADS, WIDTH, LENGTH, BATCH, LAYERS = 4, 128, 128, 8, 4


class Attention(nn.Module):
    """Causal attention, fused or step by step, with as many heads of keys as wanted."""

    def __init__(self, kind: str, keys: int = HEADS) -> None:
        super().__init__()
        self.num_heads, self.kind, self.keys = HEADS, kind, keys
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, keys * WIDTH // HEADS) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for t in made)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.kind == "fused":
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.keys < HEADS)
        else:
            z = F.softmax(_scores(q, k), dim=-1) @ v
        return self.out(z.transpose(1, 2).flatten(2))


class Torchs(nn.Module):
    """`nn.MultiheadAttention`, with weights or without."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        weights, bias = self.inner.in_proj_weight.to(x.dtype), self.inner.in_proj_bias.to(x.dtype)
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in F.linear(x, weights, bias).chunk(3, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out: Tensor = self.inner(x, x, x, attn_mask=future, need_weights=self.need_weights)[0]
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


KINDS = {
    "fused": lambda: Attention("fused"),
    "fused, keys shared": lambda: Attention("fused", keys=2),
    "step by step": lambda: Attention("steps"),
    "torch's, fused": lambda: Torchs(False),
    "torch's, step by step": lambda: Torchs(True),
}


def _scores(q: Tensor, k: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)


def _model(kind: str, layers: int, gain: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(64, WIDTH), *(Block(KINDS[kind]()) for _ in range(layers)), nn.Linear(WIDTH, 64))
    with torch.no_grad():
        for block in list(model)[1:-1]:
            for name, p in block.attention.named_parameters():
                if "q_proj" in name or "k_proj" in name or "in_proj" in name:
                    p.mul_(gain)
    return model


def _exact(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Return the largest logit of each head of each block, in float64."""
    found = []
    with torch.no_grad():
        h = model[0](x)
        for block in list(model)[1:-1]:
            inside = block.norm1(h).double()
            q, k, _ = block.attention.double().parts(inside)
            found.append(_scores(q, k).amax(dim=(0, 2, 3)))
            block.attention.float()
            h = block(h)
    return found


def _step(model: nn.Module, x: Tensor, watch: Watch, optimizer: torch.optim.Optimizer) -> float:
    begun = time.process_time()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, 1), x.roll(1, dims=1).flatten())
    loss.backward()
    watch.step(loss=loss)
    return time.process_time() - begun


def logits(kind: str) -> float:
    """Return the largest relative error of a head's largest logit."""
    model, x = _model(kind, 2), torch.randint(64, (2, 32))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    exact = _exact(model, x)
    with Watch(model, optimizer, rules="observe", statistics=[AttentionScores(every=1)]) as watch:
        _step(model, x, watch, optimizer)
    scalars = watch.history[0].scalars
    heads = [(n.split("/"), v) for n, v in scalars.items() if n.startswith("attention_logit_max/")]
    assert len(heads) == 2 * HEADS
    return max(abs(v / float(exact[int(n[1].split(".")[0]) - 1][int(n[2])]) - 1) for n, v in heads)


def clipped(kind: str) -> tuple[float, int]:
    """Return the largest logit after one clipped step over the limit, and how many heads were clipped."""
    model, x = _model(kind, 1, gain=6.0), torch.randint(64, (2, 32))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    limit = float(_exact(model, x)[0].median())
    with Watch(model, optimizer, rules="observe", treatments=[QKClip(limit)]) as watch:
        _step(model, x, watch, optimizer)
    return float(_exact(model, x)[0].max()) / limit, int(watch.history[0].treatments[0].values["heads"])


def cost(statistics_: Sequence[Any], treatments: Sequence[Any], rounds: int = 12) -> tuple[float, float]:
    """Return the median of a step's time with them over that of a step without, and its smallest."""
    ratios = []
    torch.manual_seed(0)
    both = []
    for given in (((), ()), (statistics_, treatments)):
        model = _model("fused", LAYERS)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        options = {"activations_every": None, "updates_every": None, "histograms_every": None}
        watch = Watch(model, optimizer, rules="observe", statistics=given[0], treatments=given[1], **options)
        both.append((model, watch, optimizer))
    for _ in range(rounds):
        x = torch.randint(64, (BATCH, LENGTH))
        plain, measured = (_step(model, x, watch, optimizer) for model, watch, optimizer in both)
        ratios.append(measured / plain)
    for _, watch, _ in both:
        watch.close()
    return statistics.median(ratios), min(ratios)


def rows(seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: what, found, asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    error = max(map(logits, KINDS))
    yield f"attention: largest logit, {len(KINDS)} forms", f"largest error {error:.1e}", "exact"
    after = {kind: clipped(kind) for kind in KINDS}
    most, heads = max(r for r, _ in after.values()), sum(n for _, n in after.values())
    yield "QK-Clip: next largest logit over the limit, less 1", f"{most - 1:+.0e}; {heads} heads clipped", "at most 0"
    what = f"a step of a GPT ({LAYERS} blocks of {WIDTH}, {BATCH} x {LENGTH} tokens)"
    median, _ = cost([AttentionScores(every=1)], [])
    yield f"attention: {what} that measures", f"{median:.2f} of one that does not; at 1 in 50", "-"
    median, _ = cost([], [QKClip(1e6)])
    yield f"QK-Clip: {what}, all heads below", f"{median:.3f} of one without", "-"
    median, _ = cost([], [QKClip(1e-6)])
    yield f"QK-Clip: {what}, all heads above", f"{median:.3f} of one without", "-"
