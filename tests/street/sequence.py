"""Sequences: a packed LSTM, a GPT, a translator with attention, a recogniser with CTC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from .data import generator, text
from .street import Street, program


class Tagger(nn.Module):
    """Is there an odd number of ones so far? Packed batches in, a tuple out."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        out, (hidden, cell) = self.lstm(packed)
        out, _ = pad_packed_sequence(out, batch_first=True)
        return self.head(out), (hidden, cell)


@program()
def lstm_packed(street: Street):
    """Sequences of unequal length, padding ignored by the loss, gradients clipped by the user."""
    draw = generator()
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            lengths = torch.randint(2, 9, (16,), generator=draw)
            rows = [torch.randint(2, (int(n),), generator=draw) for n in lengths]
            tokens = pad_sequence([row + 1 for row in rows], batch_first=True)
            labels = pad_sequence([row.cumsum(0) % 2 for row in rows], batch_first=True, padding_value=-100)
            scores, _ = model(tokens, lengths)
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            watch.step(loss=loss, batch={"tokens": tokens, "lengths": lengths, "packed": pack_sequence(rows, False)})
            street.note(loss)
    return model, optimizer


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Returns scores and, where there are targets, the loss; the head shares its weight with the embedding."""

    def __init__(self, letters: int, width: int = 32, depth: int = 2, length: int = 32) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "tokens": nn.Embedding(letters, width),
                "places": nn.Embedding(length, width),
                "blocks": nn.ModuleList([Block(width, 4) for _ in range(depth)]),
                "norm": nn.LayerNorm(width),
            }
        )
        self.head = nn.Linear(width, letters, bias=False)
        self.apply(self._init)
        self.transformer["tokens"].weight = self.head.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer["tokens"](tokens) + self.transformer["places"](torch.arange(tokens.shape[1]))
        for block in self.transformer["blocks"]:
            x = block(x)
        scores = self.head(self.transformer["norm"](x))
        loss = None if targets is None else F.cross_entropy(scores.view(-1, scores.shape[-1]), targets.reshape(-1))
        return scores, loss


def letters_batch(draw: torch.Generator, size: int = 8, length: int = 32) -> tuple[Tensor, Tensor]:
    data, _ = text()
    starts = torch.randint(len(data) - length - 1, (size,), generator=draw)
    rows = torch.stack([data[i : i + length + 1] for i in starts])
    return rows[:, :-1], rows[:, 1:]


@program()
def gpt(street: Street):
    """Tied embeddings, two micro-batches a step, decay groups, warm-up and cosine, clip."""
    draw = generator()
    model = GPT(text()[1])
    wide = [p for p in model.parameters() if p.ndim > 1]
    flat = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": wide, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}], lr=3e-3
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20))
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            parts = []
            for micro in range(2):
                tokens, targets = letters_batch(draw)
                _, loss = model(tokens, targets)
                (loss / 2).backward()
                parts.append(loss.detach())
                if micro == 0:
                    watch.micro_batch(loss, batch=tokens)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            watch.step(loss=loss, batch=tokens)
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            street.note(*parts)
    return model, optimizer


class Translator(nn.Module):
    """Reads a sequence, then writes it backwards, one token at a time through one GRU cell."""

    def __init__(self, letters: int = 12, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.cell = nn.GRUCell(2 * width, width)
        self.attend = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, letters)

    def forward(self, source: Tensor, target: Tensor, forcing: float = 0.7) -> Tensor:
        memory, state = self.encoder(self.embed(source))
        state, token, scores = state[0], torch.zeros_like(target[:, 0]), []
        for i in range(target.shape[1]):
            weights = torch.softmax((memory @ self.attend(state)[:, :, None]).squeeze(-1), dim=-1)
            context = (weights[:, None] @ memory).squeeze(1)
            state = self.cell(torch.cat([self.embed(token), context], -1), state)
            scores.append(self.head(state))
            token = target[:, i] if torch.rand(()) < forcing else scores[-1].argmax(-1).detach()
        return torch.stack(scores, 1)


@program()
def seq2seq(street: Street):
    """Teacher forcing by the toss of a coin; one module called many times a step."""
    draw = generator()
    model = Translator()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            source = torch.randint(1, 12, (16, 6), generator=draw)
            target = source.flip(1)
            loss = F.cross_entropy(model(source, target).transpose(1, 2), target)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch=(source, target))
            street.note(loss)
    return model, optimizer


class Recogniser(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(4, width, 3, padding=1), nn.BatchNorm1d(width), nn.Hardtanh(0, 20, inplace=True)
        )
        self.rnn = nn.GRU(width, width, bidirectional=True)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, sound: Tensor) -> Tensor:
        out, _ = self.rnn(self.conv(sound).permute(2, 0, 1))
        return self.head(out).log_softmax(-1)


@program()
def ctc(street: Street):
    """Every symbol sounds for two or three frames; targets joined end to end, lengths apart."""
    draw = generator()
    model = Recogniser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    criterion = nn.CTCLoss(blank=0, zero_infinity=True)
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            words = [torch.randint(1, 5, (int(n),), generator=draw) for n in torch.randint(3, 6, (8,), generator=draw)]
            sounds = [F.one_hot(w - 1, 4).float().repeat_interleave(3, 0) for w in words]
            sound = pad_sequence(sounds, batch_first=True).transpose(1, 2)
            sound = sound + 0.1 * torch.randn(sound.shape, generator=draw)
            scores = model(sound)
            frames, lengths = torch.tensor([len(s) for s in sounds]), torch.tensor([len(w) for w in words])
            loss = criterion(scores, torch.cat(words), frames, lengths)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch=(sound, words, frames, lengths))
            street.note(loss)
    return model, optimizer
