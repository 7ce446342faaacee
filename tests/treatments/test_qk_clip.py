"""QK-Clip: logits of a head above the limit come down to it through the weights; heads below keep every bit."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwatch import Watch
from gradwatch.errors import ConfigError
from gradwatch.treatments import QKClip
from gradwatch.treatments._qk_heads import owners_of, rescale_
from tests.gloo import spawn

WIDTH, HEADS, D, LENGTH = 32, 4, 8, 5


class Conv1D(nn.Module):
    """As Hugging Face's: the weight the other way round."""

    def __init__(self, out: int, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, out) * 0.2), nn.Parameter(torch.randn(out) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """Attention with projections under the names of this library or that, in any of their layouts."""

    def __init__(self, kind: str, keys: int = HEADS, rotary: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.kind, self.keys, self.rotary, self.norm = HEADS, kind, keys, rotary, norm
        total = (HEADS + 2 * keys) * D
        if kind == "separate":
            self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, keys * D, bias=False)
            self.v_proj = nn.Linear(WIDTH, keys * D)
        elif kind == "by_group":
            self.query_key_value = nn.Linear(WIDTH, total)
        else:
            self.c_attn = Conv1D(total, WIDTH) if kind == "conv1d" else nn.Linear(WIDTH, total)

    def parts(self, x: torch.Tensor, change: Any = lambda t: t) -> tuple[torch.Tensor, ...]:
        if self.kind == "separate":
            made = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            q, k, v = (change(t).unflatten(-1, (-1, D)) for t in made)
        elif self.kind == "by_group":
            groups = self.query_key_value(x).unflatten(-1, (self.keys, HEADS // self.keys + 2, D))
            q, k, v = groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :]
        else:
            sizes = [HEADS * D, self.keys * D, self.keys * D]
            q, k, v = (t.unflatten(-1, (-1, D)) for t in self.c_attn(x).split(sizes, dim=-1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.rotary:
            q, k = turned(q), turned(k)
        if self.norm:
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x)
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.keys < HEADS)
        return x + z.transpose(1, 2).flatten(2)


def turned(t: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(float(t.shape[-2]))[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    a, b = t.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Torchs(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        with torch.no_grad():
            self.inner.in_proj_bias.normal_(0, 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        keys = x[..., : self.inner.kdim]
        if self.inner.bias_k is not None:
            return x + self.inner(x, keys, x[..., : self.inner.vdim], need_weights=False)[0]
        return x + self.inner(x, keys, x[..., : self.inner.vdim], need_weights=False, attn_mask=future)[0]


KINDS = {
    "separate": lambda: Attention("separate"),
    "separate-grouped-rotary": lambda: Attention("separate", keys=2, rotary=True),
    "fused": lambda: Attention("fused", rotary=True),
    "fused-grouped": lambda: Attention("fused", keys=2),
    "conv1d": lambda: Attention("conv1d"),
    "by-head": lambda: Attention("by_group"),
    "by-group-rotary": lambda: Attention("by_group", keys=2, rotary=True),
    "torch": lambda: Torchs(),
    "torch-of-other-widths": lambda: Torchs(kdim=16, vdim=16),
    "torch-with-learned-keys": lambda: Torchs(add_bias_kv=True),
}


def logits(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the largest logit of each head, in float64."""
    with torch.no_grad():
        x, attention = x.double(), copy.deepcopy(attention).double()
        if isinstance(attention, Attention):
            q, k, _ = attention.parts(x)
            k = k.repeat_interleave(HEADS // attention.keys, dim=1)
        else:
            inner = attention.inner
            if inner.in_proj_weight is None:
                weights = (inner.q_proj_weight, inner.k_proj_weight)
            else:
                weights = inner.in_proj_weight[:WIDTH], inner.in_proj_weight[WIDTH : 2 * WIDTH]
            biases = inner.in_proj_bias[:WIDTH], inner.in_proj_bias[WIDTH : 2 * WIDTH]
            q, k = x @ weights[0].T + biases[0], x[..., : inner.kdim] @ weights[1].T + biases[1]
            if inner.bias_k is not None:
                k = torch.cat([k, inner.bias_k.expand(len(x), 1, -1)], dim=1)
            q, k = (t.unflatten(-1, (HEADS, D)).transpose(1, 2) for t in (q, k))
        scores = q @ k.transpose(-1, -2) / math.sqrt(D)
        if getattr(getattr(attention, "inner", None), "bias_k", None) is None:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return scores.amax(dim=(0, 2, 3))


def model_of(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), KINDS[kind](), nn.Linear(WIDTH, 3))


def step(model: nn.Module, x: torch.Tensor, treatment: Any, *, rate: float = 0.0, **options: Any) -> Watch:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with Watch(model, optimizer, rules="observe", treatments=[treatment], **options) as watch:
        loss = model(x).square().mean()
        loss.backward()
        watch.step(loss=loss)
        optimizer.zero_grad()
    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_logits_come_down_to_the_limit_and_no_other_head_changes(kind: str) -> None:
    model, x = model_of(kind), torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    before, names = logits(model[1], model[0](x)), dict(model.named_parameters())
    old = {name: p.detach().clone() for name, p in names.items()}
    limit = float(before.sort().values[1:3].mean())  # two heads above, two below
    watch = step(model, x, QKClip(limit), on_error="raise")
    after = logits(model[1], model[0](x))
    clipped = before > limit
    assert clipped.sum() == 2
    assert (after[clipped] <= limit).all()
    assert torch.allclose(after[clipped], torch.full((2,), limit, dtype=torch.float64), rtol=1e-4)
    assert torch.allclose(after[~clipped], before[~clipped], rtol=1e-5)
    (report,) = watch.history[0].treatments
    assert report.values["max_logit"] == pytest.approx(before.max().item(), rel=1e-5)
    assert report.values["heads"] == 2
    for name, p in names.items():  # what no clipped head has a part in keeps every bit
        is_other = name.startswith(("0.", "2.")) or "v_proj" in name or "out_proj" in name
        same = p == old[name]
        assert same.all() if is_other else same.any(), name


def test_a_head_below_keeps_every_bit_of_its_rows() -> None:
    model, x = model_of("separate"), torch.randn(3, LENGTH, WIDTH) * 3
    before = logits(model[1], model[0](x))
    q, k = model[1].q_proj.weight.detach().clone(), model[1].k_proj.weight.detach().clone()
    step(model, x, QKClip(float(before.sort().values[1:3].mean())))
    below = before < before.sort().values[1:3].mean()
    for old, new in ((q, model[1].q_proj.weight), (k, model[1].k_proj.weight)):
        same = (old == new).view(HEADS, -1).all(dim=1)
        assert torch.equal(same, below)


def test_below_the_limit_nothing_changes_at_all() -> None:
    model, x = model_of("torch"), torch.randn(3, LENGTH, WIDTH)
    other = copy.deepcopy(model)
    watch = step(model, x, QKClip(), rate=0.1)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not watch.history[0].treatments[0].applied


def test_no_factor_helps_an_infinite_logit_so_its_head_stays_as_it_is() -> None:
    model, x = model_of("separate"), torch.randn(2, LENGTH, WIDTH)
    with Watch(model, torch.optim.SGD(model.parameters(), 0.0), rules="observe", treatments=[QKClip(0.01)]) as watch:
        model(x)
        with torch.no_grad():
            for projection in (model[1].q_proj, model[1].k_proj):
                projection.weight[0] *= 1e25  # of the first head; the product of both is beyond float32
        old = copy.deepcopy(model.state_dict())
        model(x)
        model[2].weight.sum().backward()
        watch.step()
    report, new = watch.history[0].treatments[0], model.state_dict()
    assert (report.values["max_logit"], report.values["heads"]) == (math.inf, HEADS - 1)
    assert torch.equal(new["1.q_proj.weight"][:D], old["1.q_proj.weight"][:D])


def test_micro_batches_count_together() -> None:
    model = model_of("fused")
    large, small = torch.randn(2, LENGTH, WIDTH) * 6, torch.randn(2, LENGTH, WIDTH)
    before = logits(model[1], model[0](large)).max()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watch(model, optimizer, rules="observe", treatments=[QKClip(float(before) / 2)]) as watch:
        for x in (large, small):
            model(x).square().mean().backward()
        watch.step()
    assert watch.history[0].treatments[0].values["max_logit"] == pytest.approx(before.item(), rel=1e-5)
    assert logits(model[1], model[0](large)).max() <= float(before) / 2


def test_a_vetoed_step_moves_nothing() -> None:
    class Veto(QKClip):
        def apply_(self, grads, context):
            context.veto(True, reason="not this one")
            return super().apply_(grads, context)

    model, x = model_of("fused"), torch.randn(2, LENGTH, WIDTH) * 6
    old = copy.deepcopy(model.state_dict())
    step(model, x, Veto(0.1))
    assert all(torch.equal(p, old[name]) for name, p in model.state_dict().items())


def test_a_forward_that_is_broken_off_leaves_it_listening() -> None:
    class Broken(Attention):
        broken = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Broken("fused")), torch.randn(2, LENGTH, WIDTH) * 6
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watch(model, optimizer, rules="observe", treatments=[QKClip(0.5)]) as watch:
        for broken in (False, True, False):
            model[1].broken = broken
            try:
                loss = model(x).square().mean()
            except KeyboardInterrupt:
                continue
            loss.backward()
            watch.step(loss=loss)
            assert logits(model[1], model[0](x)).max() <= 0.5
            with torch.no_grad():
                model[1].c_attn.weight.mul_(4)
    assert [r.treatments[0].applied for r in watch.history] == [True, True]


@pytest.mark.parametrize("paths", ["*", "nothing.*"])
def test_a_model_without_known_projections_is_refused_when_it_is_made(paths: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()) if paths == "*" else model_of("fused")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match=r"QKClip: Sequential has no attention at .* whose projections of queries"):
        Watch(model, optimizer, treatments=[QKClip(paths=paths)])


def test_normalised_queries_are_told_and_the_step_is_vetoed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention("fused", norm=True))
    with pytest.warns(UserWarning, match="treatment 'qkclip' failed"):
        watch = step(model, torch.randn(2, LENGTH, WIDTH), QKClip())
    assert watch.history[0].skipped
    assert "are not the queries and keys that attend" in watch.incidents[0].message


@pytest.mark.parametrize("kind", ["torch", "torch-with-learned-keys"])
def test_rescaling_reads_nothing_back_to_the_host(kind: str) -> None:
    inner = model_of(kind)[1].inner.to("meta")
    (owner,) = owners_of(inner, ["*"], lambda paths, patterns: [True] * len(paths))
    assert owner.weights is not None
    rescale_(owner.weights, torch.ones(HEADS, device="meta"))


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_a_limit_that_can_not_be_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="QKClip: `max_logit` must be a number above 0"):
        QKClip(value)


def on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = model_of("torch")
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(rank)) * (2 + 4 * rank)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Watch(wrapped, optimizer, rules="observe", treatments=[QKClip(1.0)]) as watch:
        for _ in range(2):
            loss = wrapped(x).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    torch.save((model.state_dict(), watch.history[0].treatments[0].values), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_rescale_alike_by_the_largest_logit_of_any(tmp_path: Any) -> None:
    spawn(on_rank, (str(tmp_path),))
    (one, a), (other, b) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert a == b
    assert a["heads"] == HEADS
