"""An LSTM that reads a long text in short pieces: its hidden state is carried from each piece to the next."""
import os
from functools import partial
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.utils.data import DataLoader

from loopctl import fit


def data(streams: int = 40, length: int = 32):
    """Python's manual as `streams` texts side by side, in batches of their next `length` characters, in order."""
    text = torch.tensor(list("".join(topics.values()).encode("ascii", "replace"))[:200_000])
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    parts = [part.unflatten(0, (streams, -1)) for part in text.split([160_000, 40_000])]
    return [batches(part[rank::processes], length) for part in parts]          # each process has texts of its own


def batches(streams, length):
    """Pairs of characters and the ones that follow each of them. Backpropagation is truncated to one batch."""
    pairs = list(zip(streams[:, :-1].split(length, 1), streams[:, 1:].split(length, 1), strict=True))
    return DataLoader(pairs, batch_size=None)           # each pair is a batch already


class Model(nn.Module):
    """Predicts the next character from the one before it and a hidden state of all earlier ones."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.characters, self.head = nn.Embedding(128, width), nn.Linear(width, 128)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, text, state):
        hidden, state = self.lstm(self.characters(text), state)
        return self.head(hidden), state


def forward(model, batch, state):
    """The loss of a batch, given the state after the batch before; None at the start of each pass, which is zero."""
    text, following = batch
    logits, state = model(text, state)
    return nn.functional.cross_entropy(logits.transpose(1, 2), following), logits, {}, state


def main():
    torch.manual_seed(0)
    train, valid = data()
    return fit(Model(), None, partial(torch.optim.AdamW, lr=0.005), train, valid, forward=forward, epochs=4, seed=0,
               plugins=["clip:max_norm=1", "cosine:by=step"])


if __name__ == "__main__":
    print(main().history[-1])
