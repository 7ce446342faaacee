"""Images: a residual CNN, a ViT, a frozen backbone, a linear probe, a U-net in mixed precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batches, digits
from .street import Street, program


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)


def resnet(width: int = 8) -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(width, 10))
    return nn.Sequential(stem, Residual(width), Residual(width), head)


@program(steps=55)
def cnn(street: Street):
    """Residual blocks with in-place sums, momentum, cosine schedule, validation now and then."""
    images, labels = digits()
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=street.steps)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(batches(images[:1500], labels[:1500], size=32, steps=street.steps)):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            watch.step(loss=loss, batch=(x, y))
            schedule.step()
            street.note(loss)
            if i % 25 == 24:
                model.eval()
                with torch.no_grad():
                    watch.validation(loss=F.cross_entropy(model(images[1500:]), labels[1500:]))
                model.train()
    return model, optimizer


class ViT(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(images), -1, -1), tokens], dim=1) + self.position
        return self.head(self.blocks(tokens)[:, 0])


@program()
def vit(street: Street):
    """A class token, AdamW with and without decay, a warm-up, mixup, a clip of the user's own."""
    images, labels = digits()
    model = ViT()
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    with street.watch(model, optimizer) as watch:
        for x, y in batches(images, labels, size=32, steps=street.steps):
            share = float(torch.distributions.Beta(0.2, 0.2).sample())
            other = torch.randperm(len(x))
            scores = model(share * x + (1 - share) * x[other])
            loss = share * F.cross_entropy(scores, y) + (1 - share) * F.cross_entropy(scores, y[other])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            watch.step(loss=loss)
            warmup.step()
            optimizer.zero_grad()
            street.note(loss)
    return model, optimizer


@program(steps=55)
def frozen_backbone(street: Street):
    """A backbone in eval mode without gradients; the head is trained, and half way the last block, too."""
    images, labels = digits()
    model = resnet()
    backbone, last, head = model[:2], model[2], model[3]
    for p in [*backbone.parameters(), *last.parameters()]:
        p.requires_grad_(False)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(batches(images, labels, size=32, steps=street.steps)):
            model.train()
            backbone.eval()
            if i == street.steps // 2:
                for p in last.parameters():
                    p.requires_grad_(True)
                optimizer.add_param_group({"params": list(last.parameters()), "lr": 1e-3})
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


@program()
def linear_probe(street: Street):
    """Features computed once under no_grad; one linear layer on top."""
    images, labels = digits()
    encoder = resnet().eval()
    with torch.no_grad():
        features = encoder[:3](images).flatten(1)
    probe = nn.Linear(features.shape[1], 10)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1, momentum=0.9)
    with street.watch(probe, optimizer) as watch:
        for x, y in batches(features, labels, size=64, steps=street.steps):
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(probe(x), y)
            loss.backward()
            watch.step(loss=loss, batch=(x, y), outputs=None, targets=y)
            street.note(loss)
    return encoder, probe, optimizer


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._block(1, width), self._block(width, 2 * width)])
        self.middle = self._block(2 * width, 2 * width)
        self.up = nn.ModuleDict({"1": self._block(4 * width, width), "0": self._block(2 * width, width)})
        self.out = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _block(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.LeakyReLU(0.1, inplace=True)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        middle = self.middle(F.max_pool2d(second, 2))
        middle = self.up["1"](torch.cat([F.interpolate(middle, scale_factor=2), second], 1))
        return {"logits": self.out(self.up["0"](torch.cat([F.interpolate(middle, scale_factor=2), first], 1)))}


@program()
def unet_amp(street: Street):
    """Segmentation with skip connections, a dict for output, channels_last, autocast and a loss scaler."""
    images, _ = digits()
    model = UNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=50)
    with street.watch(model, optimizer, scaler=scaler) as watch:
        for (x,) in batches(images, size=16, steps=street.steps):
            noisy = (x + 0.3 * torch.randn_like(x)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(noisy)["logits"]
            mask = (x > 0.5).float()
            loss = F.binary_cross_entropy_with_logits(out.float(), mask)
            optimizer.zero_grad(set_to_none=False)
            scaler.scale(loss).backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer
