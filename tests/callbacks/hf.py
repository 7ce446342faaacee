"""A tiny model of the transformers package, built from a config, and a dataset for it. No download."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback


class Sentences(Dataset):
    """Random tokens; the label tells whether the first one is in the upper half of the vocabulary."""

    def __init__(self, num: int = 48, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 32, (num, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[i], "labels": int(self.tokens[i, 0] >= 16)}


def bert(dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 3, "save_strategy": "no"}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 2e-3, "seed": 7}
    return TrainingArguments(output_dir=str(folder), **{**settings, **options})


def trainer(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, evaluated: Dataset | None = None, **options: Any
) -> Trainer:
    model = bert() if model is None else model
    settings = arguments(folder, **options)
    return Trainer(model, settings, train_dataset=Sentences(), eval_dataset=evaluated, callbacks=list(callbacks))
