"""A variational autoencoder of handwritten digits. Its loss has two parts, and each has its mean over the epoch."""
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import fit


def data():
    """1,797 images of 8x8 pixels from 0 to 1, scikit-learn's, without labels; every fifth is to validate on."""
    images = torch.tensor(load_digits().data / 16).float()
    held_out = torch.arange(len(images)) % 5 == 0
    return [TensorDataset(images[part]) for part in (~held_out, held_out)]


class Model(nn.Module):
    """An encoder to the mean and the log variance of a code, and a decoder from a code to the logits of the pixels."""

    def __init__(self, code: int = 8, width: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 64))


def forward(model, batch, beta: float = 1.0):
    """The negative evidence lower bound of a batch, in nats per image; with `beta`, as in a beta-VAE."""
    (images,) = batch
    mean, log_variance = model.encoder(images).chunk(2, 1)
    output = model.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())
    reconstruction = nn.functional.binary_cross_entropy_with_logits(output, images, reduction="sum") / len(images)
    kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2 / len(images)
    return reconstruction + beta * kl, output, {"reconstruction": reconstruction, "kl": kl}


def main():
    torch.manual_seed(0)
    train, valid = data()
    return fit(
        Model(), None, partial(torch.optim.Adam, lr=0.003), DataLoader(train, 64, shuffle=True), DataLoader(valid, 64),
        epochs=30, forward=forward, seed=0)


if __name__ == "__main__":
    print(main().history[-1])
