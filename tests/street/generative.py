"""Generators: VAE, diffusion, GAN, Wasserstein GAN with a gradient penalty, a normalising flow."""

from __future__ import annotations

import copy
import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batches, digits, generator
from .street import Street, program


class VAE(nn.Module):
    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
        self.mean, self.log_var = nn.Linear(64, latent), nn.Linear(64, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return self.decoder(code), mean, log_var


@program(steps=55)
def vae(street: Street):
    """Reparametrisation with the global random state; a loss summed over pixels; KL warmed up."""
    images, _ = digits()
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with street.watch(model, optimizer) as watch:
        for i, (x,) in enumerate(batches(images, size=64, steps=street.steps)):
            scores, mean, log_var = model(x)
            fit = F.binary_cross_entropy_with_logits(scores, x, reduction="sum") / len(x)
            divergence = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean()
            loss = fit + min(1.0, i / 50) * divergence
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch=x)
            street.note(loss, divergence)
    return model, optimizer


class Denoiser(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.GroupNorm(4, width) for _ in range(2)])
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        self.register_buffer("frequencies", torch.exp(-math.log(1e3) * torch.arange(8) / 8), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        shift = self.time(torch.cat([angle.sin(), angle.cos()], -1))[:, :, None, None]
        x = self.first(x)
        for conv, norm in zip(self.middle, self.norms, strict=True):
            x = x + F.silu(norm(conv(x) + shift))
        return self.last(x)


@program()
def ddpm(street: Street):
    """Predicts the noise at a random time; the last layer begins at zero; an EMA copy is updated by lerp."""
    images, _ = digits()
    model = Denoiser()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.08, 100), 0)
    with street.watch(model, optimizer) as watch:
        for (x,) in batches(2 * images - 1, size=32, steps=street.steps):
            t = torch.randint(100, (len(x),))
            noise, share = torch.randn_like(x), kept[t][:, None, None, None]
            loss = F.mse_loss(model(share.sqrt() * x + (1 - share).sqrt() * noise, t.float()), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            watch.step(loss=loss)
            optimizer.zero_grad()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.01)
            street.note(loss)
    return model, average, optimizer


class GAN(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        normed = [nn.BatchNorm1d(64)] if norm else []
        self.generator = nn.Sequential(nn.Linear(8, 64), *normed, nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.critic = nn.Sequential(
            nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)
        )


@program(steps=55)
def gan(street: Street):
    """Two optimizers that step in turns, each on its own backward; one-sided label smoothing."""
    images, _ = digits()
    model = GAN()
    of_generator = torch.optim.Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    of_critic = torch.optim.Adam(model.critic.parameters(), lr=5e-4, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    with street.watch(model, [of_generator, of_critic]) as watch:
        for (x,) in batches(images.flatten(1), size=32, steps=street.steps):
            fake = model.generator(torch.randn(len(x), 8))
            ones, zeros = torch.full((len(x), 1), 0.9), torch.zeros(len(x), 1)
            of_critic.zero_grad()
            loss_critic = criterion(model.critic(x), ones) + criterion(model.critic(fake.detach()), zeros)
            loss_critic.backward()
            watch.step(loss=loss_critic, optimizer=of_critic)
            of_generator.zero_grad()
            loss_generator = criterion(model.critic(fake), torch.ones(len(x), 1))
            loss_generator.backward()
            watch.step(loss=loss_generator, optimizer=of_generator)
            street.note(loss_critic, loss_generator)
    return model, of_generator, of_critic


@program()
def wgan_gp(street: Street):
    """Two critic steps for each of the generator; a penalty on the gradient at points in between (double backward)."""
    images, _ = digits()
    model = GAN(norm=False)
    of_generator = torch.optim.RMSprop(model.generator.parameters(), lr=2e-4)
    of_critic = torch.optim.Adam(model.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
    with street.watch(model, [of_critic, of_generator]) as watch:
        for i, (x,) in enumerate(batches(images.flatten(1), size=32, steps=street.steps)):
            fake = model.generator(torch.randn(len(x), 8)).detach()
            share = torch.rand(len(x), 1)
            between = (share * x + (1 - share) * fake).requires_grad_(True)
            scores = model.critic(between)
            (slope,) = torch.autograd.grad(
                scores, between, torch.ones_like(scores), create_graph=True, retain_graph=True
            )
            loss = model.critic(fake).mean() - model.critic(x).mean() + 10 * (slope.norm(2, dim=1) - 1).square().mean()
            of_critic.zero_grad()
            loss.backward()
            watch.step(loss=loss, optimizer=of_critic)
            street.note(loss)
            if i % 2:
                for p in model.critic.parameters():
                    p.requires_grad_(False)
                of_generator.zero_grad()
                loss = -model.critic(model.generator(torch.randn(len(x), 8))).mean()
                loss.backward()
                watch.step(loss=loss, optimizer=of_generator)
                for p in model.critic.parameters():
                    p.requires_grad_(True)
    return model, of_generator, of_critic


class Coupling(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.net(x * self.mask).chunk(2, -1)
        scale, shift = scale.tanh() * (1 - self.mask), shift * (1 - self.mask)
        return x * scale.exp() + shift, scale.sum(-1)


class Flow(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Coupling(torch.tensor([i % 2, 1 - i % 2])) for i in range(depth)])
        self.register_buffer("centre", torch.zeros(2, dtype=torch.float64))

    def log_prob(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, volume = layer(x)
            total = total + volume
        return total - 0.5 * (x - self.centre.float()).square().sum(-1) - math.log(2 * math.pi)


@program()
def flow(street: Street):
    """Real NVP on two moons: integer masks for buffers, a method other than forward, AMSGrad."""
    draw = generator()
    model = Flow()
    optimizer = torch.optim.Adam(chain(model.parameters()), lr=2e-3, amsgrad=True)
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            angle, side = math.pi * torch.rand(64, generator=draw), torch.randint(2, (64,), generator=draw)
            moons = torch.stack([angle.cos() + side, angle.sin() * (1 - 2 * side) + 0.5 * side], -1)
            loss = -model.log_prob(moons + 0.1 * torch.randn(64, 2, generator=draw)).mean()
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer
