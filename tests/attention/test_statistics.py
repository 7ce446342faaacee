"""What attention does is seen as it is computed, head by head, in modules of all makes; and looking changes nothing."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwatch import Watch, load_rules
from gradwatch.attention import AttentionScores
from gradwatch.errors import ConfigError
from gradwatch.testing import check_statistic

LENGTH, WIDTH, HEADS = 6, 16, 4


class Own(nn.Module):
    """Causal attention of nobody's library, as `scaled_dot_product_attention` or step by step."""

    def __init__(self, kind: str = "fused", keys: int = HEADS) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * keys * WIDTH // HEADS)
        self.kind, self.keys = kind, keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.keys, -1)).permute(2, 0, 3, 1, 4)
        if self.kind == "fused":
            z = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.keys < HEADS)
        else:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
            z = functional.softmax(scores, dim=-1) @ v
        return x + z.transpose(1, 2).flatten(2)


class Torchs(nn.Module):
    """`nn.MultiheadAttention` with a causal mask."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return x + self.inner(x, x, x, attn_mask=future, need_weights=self.need_weights)[0]


KINDS = {
    "own-fused": (lambda: Own(), "1"),
    "own-grouped": (lambda: Own(keys=2), "1"),
    "own-step-by-step": (lambda: Own("steps"), "1"),
    "torch-fused": (lambda: Torchs(False), "1.inner"),
    "torch-step-by-step": (lambda: Torchs(True), "1.inner"),
}


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), KINDS[kind][0](), nn.Linear(WIDTH, 3))
    with torch.no_grad():
        for p in model[1].parameters():
            p.mul_(4)
    return model


def train(model: nn.Module, statistics: object, micro: int = 1, steps: int = 3, **options: object):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    torch.manual_seed(1)
    seen = []
    with Watch(model, optimizer, rules="observe", statistics=statistics, **options) as watch:
        for _ in range(steps):
            for _ in range(micro):
                x = torch.randn(2, LENGTH, WIDTH)
                seen.append(by_hand(model, x))
                loss = model(x).square().mean()
                loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    return watch, seen


def by_hand(model: nn.Sequential, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return largest logits by head, and entropies over their bounds by head (summed apart), in float64."""
    attention = model[1]
    with torch.no_grad():
        h = model[0](x).double()
        if isinstance(attention, Own):
            q = h @ attention.q.weight.double().T + attention.q.bias.double()
            keys = attention.keys
            size = keys * WIDTH // HEADS
            k = h @ attention.kv.weight.double()[:size].T + attention.kv.bias.double()[:size]
        else:
            weights, bias = attention.inner.in_proj_weight.double(), attention.inner.in_proj_bias.double()
            q, k = (h @ weights[i * WIDTH :][:WIDTH].T + bias[i * WIDTH :][:WIDTH] for i in (0, 1))
            keys = HEADS
        q = q.unflatten(-1, (HEADS, -1))
        k = k.unflatten(-1, (keys, -1)).repeat_interleave(HEADS // keys, dim=2)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (torch.einsum("bthd,bshd->bhts", q, k) / 2).masked_fill(future, -math.inf)
        entropy = torch.special.entr(scores.softmax(-1)).sum(dim=(0, 2, 3))
        bound = torch.arange(1.0, x.shape[1] + 1, dtype=torch.float64).log().sum() * len(x)
        return scores.amax(dim=(0, 2, 3)), torch.stack([entropy, bound.expand(HEADS)])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_entropies_of_each_head_are_those_of_float64(kind: str) -> None:
    watch, seen = train(net(kind), [AttentionScores(every=1)], micro=2, on_error="raise")
    path = KINDS[kind][1]
    for step, record in enumerate(watch.history):
        (peaks, a), (others, b) = seen[2 * step : 2 * step + 2]
        peaks, (entropy, bound) = torch.maximum(peaks, others), a + b
        for head in range(HEADS):
            assert record.scalars[f"attention_logit_max/{path}/{head}"] == pytest.approx(peaks[head].item(), rel=1e-5)
            share = record.scalars[f"attention_entropy/{path}/{head}"]
            assert share == pytest.approx((entropy[head] / bound[head]).item(), rel=1e-3, abs=1e-6)
        assert record["attention_logit_max", path] == pytest.approx(peaks.max().item(), rel=1e-5)
        assert record["attention_logit_head", path] == peaks.argmax().item()
        assert record["attention_entropy", path] == pytest.approx((entropy.sum() / bound.sum()).item(), rel=1e-3)
        lowest = (entropy / bound).min().item()
        assert record["attention_entropy_min", path] == pytest.approx(lowest, rel=1e-3, abs=1e-6)
        assert record.measured("attention_logit_max").sum() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_no_bit_and_leaves_nothing(kind: str) -> None:
    seen, plain = net(kind), net(kind)
    train(seen, [AttentionScores(every=1)])
    train(plain, ())
    assert all(torch.equal(a, b) for a, b in zip(seen.parameters(), plain.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen.modules())


def test_hooks_are_on_the_model_at_measured_steps_alone() -> None:
    model, found = net("own-fused"), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    options = {"activations_every": None, "updates_every": None, "histograms_every": None}
    with Watch(model, optimizer, rules="observe", statistics=[AttentionScores(every=4)], **options) as watch:
        for _ in range(6):
            found.append(bool(model[1]._forward_pre_hooks))
            loss = model(torch.randn(2, LENGTH, WIDTH)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    assert found == [True, True, True, False, True, False]


def test_the_laws_of_statistics_hold() -> None:
    check_statistic(AttentionScores())


@pytest.mark.parametrize("given", [{"every": 0}, {"most_heads": 0}, {"on_record": -1}, {"every": True}])
def test_a_setting_that_can_not_be_is_said(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"AttentionScores: `{next(iter(given))}` is a whole number"):
        AttentionScores(**given)


class Foreign(nn.Module):
    """Attention by a kernel that nobody knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_attention_that_is_not_seen_is_said() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Own(), nn.Linear(WIDTH, 3))
    model.attention = type("FlashAttention", (Foreign,), {})()
    watch, _ = train(model, ["attention"], steps=1)
    assert any(note.startswith("attention of attention is not seen") for note in watch.session.notes)


def test_many_heads_stand_on_record_as_modules_alone() -> None:
    watch, _ = train(net("own-fused"), [AttentionScores(every=1, on_record=3)], steps=1)
    assert watch.history[0].measured("attention_logit_max").any()
    assert not any(name.startswith("attention_logit_max/") for name in watch.history[0].scalars)


def test_checkpointing_counts_once() -> None:
    class Checkpointed(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Checkpointed(), nn.Linear(WIDTH, 3))
    watch, seen = train(model, [AttentionScores(every=1)], steps=1, on_error="raise")
    assert watch.history[0]["attention_logit_max", "1"] == pytest.approx(seen[0][0].max().item(), rel=1e-5)


def test_log_z_is_that_of_the_scores() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x, y = torch.randn(8, 3, 4), torch.randint(5, (8, 3))
    with Watch(model, optimizer, rules="observe") as watch:
        out = model(x)
        loss = functional.cross_entropy(out.flatten(0, 1), y.flatten())
        loss.backward()
        watch.step(loss=loss, batch=(x, y), outputs=out)
    expected = out.double().exp().sum(-1).log().mean().item()
    assert watch.history[0].scalars["output_log_z"] == pytest.approx(expected, rel=1e-6)


def test_the_preset_can_be_laid_over_another() -> None:
    book = load_rules(["default", "attention"])
    assert {"attention_logits_growing", "attention_entropy_collapse", "logits_drift"} <= {r.name for r in book}
    assert {s.name for s in book.statistics} == {"attention"}
