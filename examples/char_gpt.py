"""A small GPT learns Python from the standard library's own sources, and meets one corrupt batch on its way.

At one step the loss is summed where it should be averaged. Its gradient is a thousand times too large, AdamW takes it
into its running square and barely moves for long after. Three runs, side by side: without the accident, with it, and
with it under `GradWatch(rules="autoclip")`, which clips that one step to the level of the steps before.

    python examples/char_gpt.py            # about a minute on two cores
    python examples/char_gpt.py --steps 60 --dim 16 --layers 1
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from gradwatch.callbacks import GradWatch

SOURCES = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "pathlib.py", "tarfile.py", "typing.py")


def read_sources() -> str:
    """Return text that every Python installation carries."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)


class Characters(Dataset[Tensor]):
    """Pieces of a text, as character numbers, each one longer than the context."""

    def __init__(self, text: str, context: int) -> None:
        self.alphabet = sorted(set(text))
        number = {c: i for i, c in enumerate(self.alphabet)}
        self.codes = torch.tensor([number[c] for c in text])
        self.context = context

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.context

    def __getitem__(self, i: int) -> Tensor:
        return self.codes[i * self.context : (i + 1) * self.context + 1]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class CharGPT(pl.LightningModule):
    """A GPT over characters. `corrupt_step`: where the loss is summed instead of averaged; None nowhere."""

    def __init__(
        self,
        alphabet: int,
        *,
        dim: int = 64,
        layers: int = 4,
        context: int = 64,
        lr: float = 2e-3,
        corrupt_step: int | None = None,
    ) -> None:
        super().__init__()
        self.lr, self.corrupt_step = lr, corrupt_step
        self.tokens, self.places = nn.Embedding(alphabet, dim), nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads=4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, alphabet, bias=False)
        self.losses: list[float] = []
        for p in self.parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.tokens(codes) + self.places.weight[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        is_corrupt = self.global_step == self.corrupt_step
        loss = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten(), reduction="sum" if is_corrupt else "mean")
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.999), weight_decay=0.01)

    @property
    def final_loss(self) -> float:
        """Mean over the last 20 steps."""
        return sum(self.losses[-20:]) / len(self.losses[-20:])


def train(
    options: argparse.Namespace, *, corrupt: bool, callback: GradWatch | None, name: str
) -> tuple[CharGPT, pl.Trainer]:
    """Train one model; the same seed gives the same data and weights every time."""
    pl.seed_everything(options.seed, verbose=False)
    data = Characters(read_sources(), options.context)
    model = CharGPT(
        len(data.alphabet),
        dim=options.dim,
        layers=options.layers,
        context=options.context,
        corrupt_step=options.steps // 2 if corrupt else None,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        logger=TensorBoardLogger(options.out, name=name, version="") if callback is not None else False,
        callbacks=[] if callback is None else [callback],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, DataLoader(data, batch_size=options.batch, shuffle=True, drop_last=True))
    return model, trainer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/char_gpt"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run all three, print what was found, and return the final losses."""
    options = parse(arguments)
    print(f"1/3  a GPT of {options.layers} blocks on the standard library's sources, {options.steps} steps, watched")
    healthy, _ = train(options, corrupt=False, callback=GradWatch(verbose=False), name="healthy")
    print(f"2/3  the same with one corrupt batch at step {options.steps // 2}, not watched")
    spiked, _ = train(options, corrupt=True, callback=None, name="spiked")
    print('3/3  the same corrupt batch under GradWatch(rules="autoclip")\n')
    watch = GradWatch(rules="autoclip")
    saved, _ = train(options, corrupt=True, callback=watch, name="autoclip")
    losses = {"healthy": healthy.final_loss, "spiked": spiked.final_loss, "autoclip": saved.final_loss}
    print("\nloss over the last 20 steps")
    print(f"  no accident                  {losses['healthy']:.3f}")
    print(f"  corrupt batch, not watched   {losses['spiked']:.3f}")
    print(f"  corrupt batch, autoclip      {losses['autoclip']:.3f}")
    report = watch.report(options.out / "report.html")
    print(f"\nthe report:   {report}")
    print(f"TensorBoard:  tensorboard --logdir {options.out}    (then the GradWatch tab)")
    return losses


if __name__ == "__main__":
    main()
