"""What the tags of other programs' logs mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError, UnknownNameError

__all__ = ["Roles", "assign"]

NAMES = {
    "loss": ("loss", "gradwatch/loss", "train_loss", "train/loss", "training_loss", "training/loss", "loss/train",
             "train_loss_step", "train/loss_step", "loss_step", "train_loss_epoch", "train/loss_epoch",
             "loss/train_step", "lm loss", "lm-loss-training/lm loss", "train/total_loss", "total_loss"),
    "lr": ("lr", "learning_rate", "train/learning_rate", "train/lr", "learning-rate", "learning rate", "optim/lr"),
    "global_norm": ("global_norm", "gradwatch/global_norm", "grad_norm", "train/grad_norm", "grad-norm",
                    "gradient_norm", "train/gradient_norm", "total_norm", "grad_norm_total", "grad_2.0_norm_total",
                    "grad_2_norm_total", "gradients/norm", "grad/norm", "gnorm", "train/gnorm",
                    "optim/grad_norm", "optim/total_grad_norm",
                    "grad norm"),
    "global_norm_after": ("global_norm_after", "gradwatch/global_norm_after", "clipped_grad_norm", "grad_norm_clipped"),
    "val_loss": ("val_loss", "eval_loss", "eval/loss", "val/loss", "valid_loss", "valid/loss", "validation_loss",
                 "validation/loss", "loss/val", "loss/valid", "val_loss_epoch", "test/loss"),
    "epoch": ("epoch", "train/epoch"),
    "grad_scale": ("grad_scale", "loss_scale", "train/loss_scale", "amp/scale"),
}  # fmt: skip
HELD_OUT = re.compile(r"val|eval|test|dev")
LEARNING_RATE = re.compile(r"lr-[^/]+(/pg\d+)?(-momentum)?$")
COLUMNS = {"grad_norm": ("grad_2.0_norm/*", "grad_2_norm/*", "grad_norm/*", "gradients/*", "grad_norms/*")}


@dataclass
class Roles:
    """Which tag is what.

    Attributes:
        named: `loss`, `lr`, `global_norm`, ... -> tag.
        columns: column -> path -> tag.
        others: tags that stay scalars of their own name.
    """

    named: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def assign(tags: Sequence[str], scalars: Mapping[str, str], columns: Mapping[str, str], *, where: str) -> Roles:
    """Return what each tag means: first as was said, then by its name.

    Raises:
        UnknownNameError: a tag in `scalars` is not there.
        ConfigError: a pattern in `columns` has not exactly one `*`.
    """
    roles = Roles()
    for name, tag in scalars.items():
        if tag not in tags:
            raise UnknownNameError("tag", tag, tags, where=where)
        roles.named[name] = tag
    for column, pattern in columns.items():
        if pattern.count("*") != 1:
            raise ConfigError(f"the pattern of a column has one `*`, for the path. Got {column!r}: {pattern!r}.")
        roles.columns[column] = _matching(tags, (pattern,))
    lower = {tag.lower().strip(): tag for tag in reversed(tags)}
    for name, aliases in NAMES.items():
        found = next((lower[a] for a in aliases if a in lower), None)
        if found is None:
            near = (t for t in tags if _last_part(t) in aliases)
            found = next((t for t in near if name == "val_loss" or not HELD_OUT.search(t.lower())), None)
        if found is not None:
            roles.named.setdefault(name, found)
    if "lr" not in roles.named:
        rates = [t for t in tags if LEARNING_RATE.match(t) and not t.endswith("-momentum")]
        roles.named |= {"lr": rates[0]} if rates else {}
    used = set(roles.named.values())
    for column, patterns in COLUMNS.items():
        if column not in roles.columns:
            roles.columns[column] = {p: t for p, t in _matching(tags, patterns).items() if t not in used}
    used |= {t for found in roles.columns.values() for t in found.values()}
    roles.others = {tag: tag for tag in tags if tag not in used}
    return roles


def _last_part(tag: str) -> str:
    return tag.lower().strip().rpartition("/")[2]


def _matching(tags: Sequence[str], patterns: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in patterns:
        before, _, after = pattern.partition("*")
        for tag in tags:
            if tag.startswith(before) and tag.endswith(after) and len(tag) > len(before) + len(after):
                found.setdefault(tag[len(before) : len(tag) - len(after)], tag)
    return found
