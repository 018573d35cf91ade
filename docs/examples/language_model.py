"""A language model of characters, trained as nanoGPT trains: random blocks of a text, and warmup before a cosine."""
from functools import partial
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import fit

LENGTH = 64             # characters that the model sees at once


class Blocks:
    """Batches of random blocks of a text, without end. The target of each character is the next one."""

    def __init__(self, text, batch_size):
        self.text, self.batch_size = text, batch_size

    def __iter__(self):
        while True:
            starts = torch.randint(len(self.text) - LENGTH, (self.batch_size,))
            blocks = torch.stack([self.text[start:start + LENGTH + 1] for start in starts])
            yield blocks[:, :-1], blocks[:, 1:]


def data(batch_size: int = 8):
    """Random blocks of Python's manual, which comes with Python; to validate on, blocks of its last tenth in order."""
    text = torch.tensor(list("".join(topics.values()).encode("ascii", "replace")))
    train, valid = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:].unfold(0, LENGTH + 1, LENGTH)[:256]
    return Blocks(train, batch_size), DataLoader(TensorDataset(valid[:, :-1], valid[:, 1:]), 64)


class Model(nn.Module):
    """A transformer that predicts each next character from those before it: (N, LENGTH) to (N, 128, LENGTH)."""

    def __init__(self, width: int = 64, layers: int = 1):
        super().__init__()
        self.characters, self.positions = nn.Embedding(128, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128, bias=False)

    def forward(self, text):
        hidden = self.characters(text) + self.positions.weight
        for layer in self.layers:
            hidden = layer(hidden, nn.Transformer.generate_square_subsequent_mask(LENGTH, text.device), is_causal=True)
        return self.head(self.norm(hidden)).transpose(1, 2)


def main():
    torch.manual_seed(0)
    adamw = partial(torch.optim.AdamW, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    return fit(Model(), nn.CrossEntropyLoss(), adamw, *data(), epochs=4, steps_per_epoch=100, seed=0, plugins=[
        "layerwise_lr:no_decay=true", "accumulate:every=2", "clip:max_norm=1", "warmup:length=19,start_factor=0.05",
        "cosine:by=step,start=19,eta_min=0.001"])


if __name__ == "__main__":
    print(main().history[-1])
