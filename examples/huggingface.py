"""The Hugging Face Trainer with one callback more: a tiny BERT, built from a config, reads which token came first.

One micro-batch in the middle has a NaN loss. The Trainer's own clip would spread it over all weights; with the rules
`autoclip` the step is skipped and named.

    python examples/huggingface.py
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gradwatch.callbacks.transformers import GradWatchCallback


class Sentences(Dataset[dict[str, Any]]):
    """Random tokens; the label tells whether the first one is in the upper half of the vocabulary."""

    def __init__(self, num: int) -> None:
        self.tokens = torch.randint(0, 64, (num, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[i], "labels": int(self.tokens[i, 0] >= 32)}


def corrupt_once(model: BertForSequenceClassification, number: int) -> None:
    """Make the loss of one training forward NaN, as a corrupt batch would."""
    seen = []

    def spoil(module: Any, args: Any, outputs: Any) -> Any:
        if module.training:
            seen.append(1)
            if len(seen) == number:
                outputs.loss = outputs.loss * float("nan")
        return outputs

    model.register_forward_hook(spoil)


def main(arguments: list[str] | None = None) -> GradWatchCallback:
    """Train, print what gradwatch saw, and return the callback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output-dir", default=None, help="default: a temporary folder")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    settings = TrainingArguments(
        output_dir=options.output_dir or tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=20,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    watch = GradWatchCallback(rules="autoclip")
    model = BertForSequenceClassification(config)
    corrupt_once(model, options.steps)
    Trainer(model, settings, train_dataset=Sentences(640), callbacks=[watch]).train()
    return watch


if __name__ == "__main__":
    main()
