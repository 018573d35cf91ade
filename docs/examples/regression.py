"""Regression on a table: how far diabetes has progressed after a year, from age, weight and blood values."""
from functools import partial

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import fit
from loopctl.metrics.named import R2, mae


def data():
    """442 patients as (values, progression), scikit-learn's; every fifth is to validate on."""
    raw = load_diabetes(scaled=False)
    values, progression = torch.tensor(raw.data).float(), torch.tensor(raw.target).float().unsqueeze(1)
    held_out = torch.arange(len(values)) % 5 == 0
    values = (values - values[~held_out].mean(0)) / values[~held_out].std(0)
    return [TensorDataset(values[part], progression[part]) for part in (~held_out, held_out)]


class Model(nn.Module):
    """A network with one hidden layer. Its output has the unit of the target, whose mean is 150 and deviation 77."""

    def __init__(self, width: int = 32, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, values):
        return 150 + 77 * self.layers(values)


def main():
    torch.manual_seed(0)
    train, valid = data()
    return fit(
        Model(), nn.MSELoss(), partial(torch.optim.AdamW, lr=0.01), DataLoader(train, 32, shuffle=True),
        DataLoader(valid, 32), epochs=40, plugins=["cosine"], metrics={"mae": mae, "r2": R2()}, seed=0)


if __name__ == "__main__":
    print(main().history[-1])
