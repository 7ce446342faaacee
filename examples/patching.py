"""Activation patching, from training to the heatmap: where in a small transformer does the answer travel?

    python examples/patching.py [--steps 400] [--out patching.png]

The task: a sequence of random letters holds one marker `>`; at the last position, `?`, the model must name the letter
behind the marker: `a d > c b a ?` -> `c`. A transformer of three layers learns this in less than a minute on one core.

Then two prompts that differ in that letter alone: the clean one, and a corrupted one with another letter. In the run on
the corrupted prompt we put back, one at a time, the residual stream of the clean run at one layer and one position, and
ask how much of the right answer comes back. Before the layer that fetches the letter, it is the letter's position that
matters; after it, the last one. The heatmap shows where the answer moves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch.hooks import HookManager, zero

NUM_LETTERS, MARKER, QUERY, LENGTH = 12, 12, 13, 9


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    def __init__(self, depth: int = 3, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(NUM_LETTERS + 2, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_LETTERS)

    def forward(self, prompt: Tensor) -> Tensor:
        x = self.tokens(prompt) + self.positions(torch.arange(prompt.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -1]))


def prompts(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return prompts (num, LENGTH) and the letters behind their markers (num,)."""
    prompt = torch.randint(NUM_LETTERS, (num, LENGTH), generator=generator)
    at = torch.randint(LENGTH - 2, (num,), generator=generator)
    rows = torch.arange(num)
    prompt[rows, at] = MARKER
    prompt[:, -1] = QUERY
    return prompt, prompt[rows, at + 1]


def train(steps: int, *, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    for step in range(steps):
        prompt, answer = prompts(128, generator)
        loss = F.cross_entropy(model(prompt), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    prompt, answer = prompts(1000, torch.Generator().manual_seed(99))
    return (model(prompt).argmax(-1) == answer).float().mean().item()


def text_of(prompt: Tensor) -> list[str]:
    return ["abcdefghijkl>?"[i] for i in prompt.tolist()]


def main(steps: int = 400, out: str = "patching.png") -> float:
    torch.set_num_threads(1)
    model = train(steps)
    print(f"accuracy {accuracy(model):.1%}")

    clean = torch.tensor([[3, 0, MARKER, 5, 1, 8, 2, 4, QUERY]])  # d a > f b i c e ?
    corrupted = clean.clone()
    corrupted[0, 3] = 9  # d a > j b i c e ?
    right, wrong = 5, 9

    def preference(logits: Tensor) -> Tensor:
        return logits[0, right] - logits[0, wrong]

    aliases = {"blocks.{i}.hook_resid_pre": "blocks.{i}:input", "blocks.{i}.hook_resid_post": "blocks.{i}:output"}
    with HookManager(model, aliases=aliases) as hooks:
        output, cache = hooks.run_with_cache(clean, points="*.hook_resid_*")
        clean_value = preference(output).item()
        points = ["*.hook_resid_pre", f"{hooks.layers[-1]}.hook_resid_post"]
        found = hooks.sweep(points, range(LENGTH), preference, inputs=corrupted, source=cache)
        ablated = hooks.sweep(
            "blocks.*.proj:input",
            heads=range(model.blocks[0].heads),
            metric=preference,
            inputs=clean,
            intervention=lambda heads: zero(heads=heads, num_heads=model.blocks[0].heads),
        )
    restored = found.normalised(clean_value)
    labels = [f"{a}" if a == b else f"{b}→{a}" for a, b in zip(text_of(clean[0]), text_of(corrupted[0]), strict=True)]
    found.plot(
        out,
        values=restored,
        title="share of the right answer that comes back",
        label="restored (1 = as in the clean run)",
        place_labels=labels,
    )
    where = restored.argmax(axis=1)
    for name, row, best in zip(found.points, restored, where, strict=True):
        print(f"{name:26} best at position {best} ({labels[best]}): {row[best]:.2f}")
    for name, row in zip(ablated.points, ablated.values, strict=True):
        print(f"{name:26} without head 0, 1, ...: " + "  ".join(f"{v:6.2f}" for v in row))
    print(f"heatmap in {Path(out).resolve()}")
    return float(restored[-1, -1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="patching.png")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out)
