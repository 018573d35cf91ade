"""A generative adversarial network: two optimizers, each with a loss of its own, make an update in turn."""
from functools import partial
from math import pi

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from loopctl import fit

CENTRES = torch.view_as_real(torch.exp(1j * torch.arange(8) * pi / 4))          # (8, 2), on a circle


def data():
    """20,000 points in the plane, each near one of eight centres."""
    points = torch.Generator().manual_seed(0)
    centres = CENTRES[torch.randint(8, (20_000,), generator=points)]
    return TensorDataset(centres + 0.05 * torch.randn(20_000, 2, generator=points))


class Model(nn.Module):
    """Makes points from noise, and judges whether a point is of the data."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.discriminator = nn.Sequential(
            nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


def discriminator_loss(model, batch):
    fake = model.generator(torch.randn(len(batch[0]), 8)).detach()
    return softplus(-model.discriminator(batch[0])).mean() + softplus(model.discriminator(fake)).mean(), fake


def generator_loss(model, batch):
    fake = model.generator(torch.randn(len(batch[0]), 8))
    return softplus(-model.discriminator(fake)).mean(), fake


def near(fake, _):
    """The fraction of generated points that are within 0.2 of a centre."""
    return (torch.cdist(fake, CENTRES).amin(1) < 0.2).float().mean()


losses = {"discriminator": discriminator_loss, "generator": generator_loss}
adam = partial(torch.optim.Adam, betas=(0.5, 0.999))
optimizers = {"discriminator": partial(adam, lr=0.002), "generator": partial(adam, lr=0.001)}


def main():
    torch.manual_seed(0)
    return fit(Model(), None, optimizers, DataLoader(data(), 128, shuffle=True), epochs=10, forward=losses,
               metrics={"near": near}, plugins=["cosine:by=step"], seed=0)


if __name__ == "__main__":
    print(main().history[-1])
