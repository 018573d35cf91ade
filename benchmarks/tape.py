"""What the plugin `tape` adds to a step, and how large the tape of 1,000 steps is.

    python benchmarks/tape.py [rounds]

The default cnn on digits in batches of 64, and a language model of ten million parameters, a transformer, on 8
sequences of 128 tokens. One thread. A round trains with each tape right after the run without one, and the ratios are
medians of such pairs; the first row, without a tape beside itself, is what the machine's noise leaves. Prints a table
of docs/performance.md.
"""
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loopctl import fit
from loopctl.cli import data, models

TAPES = ("", "tape", "tape:every_steps=10", "tape:modules=true", "tape:every_steps=10,modules=true")
WARMUP = 2


class LanguageModel(nn.Module):
    """Ten million parameters: an embedding of 2,000 tokens and 4 layers of width 448."""

    def __init__(self, tokens: int = 2000, width: int = 448) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(self.embedding(tokens), mask=mask, is_causal=True)).transpose(1, 2)


class Timed:
    """Batches, and how long the steps with them took after the first ones."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps + WARMUP + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(len(self)):
            if number == WARMUP:
                began = process_time()
            elif number == WARMUP + self.steps:
                self.seconds = (process_time() - began) / self.steps
            yield self.batches[number % len(self.batches)]


def digits() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    found = data.make("digits", "data", download=False)
    torch.manual_seed(0)
    train, _ = found.loaders(64, 0, torch.device("cpu"))
    return models.make("cnn", found), [batch for batch in train if len(batch[0]) == 64]


def language() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 2000, (4, 8, 129))
    return LanguageModel(), [(batch[:, :-1], batch[:, 1:]) for batch in tokens]


def timed(work: tuple[nn.Module, list[tuple[Tensor, Tensor]]], spec: str, steps: int) -> tuple[float, float]:
    """Seconds per step, and bytes of the tape per step."""
    batches = Timed(work[1], steps)
    with TemporaryDirectory() as folder:
        fit(work[0], cross_entropy, partial(torch.optim.AdamW, lr=1e-3), batches, plugins=[spec] * bool(spec), seed=0,
            out=folder)
        file = Path(folder) / "run.tape"
        size = file.stat().st_size / len(batches) if spec else 0
    return batches.seconds, size


if __name__ == "__main__":
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print("| work | tape | ms per step | ratio | MB per 1,000 steps |\n|---|---|---|---|---|")
    for name, make, steps in (("cnn on digits, batch of 64", digits, 60), ("transformer, 8 x 128", language, 5)):
        work = make()
        pairs: dict[str, list[tuple[float, float]]] = {spec: [] for spec in TAPES}
        sizes = {spec: timed(work, spec, steps)[1] for spec in TAPES}
        for number in range(rounds):
            for spec in TAPES:
                pairs[spec].append((timed(work, "", steps)[0], timed(work, spec, steps)[0]))
            print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr)
        for spec in TAPES:
            ratio = median(with_tape / without for without, with_tape in pairs[spec])
            print(f"| {name} | {f'`{spec}`' if spec else 'none'} | {1e3 * median(each for _, each in pairs[spec]):.2f} "
                  f"| {ratio:.3f} | {sizes[spec] / 1e3:.1f} |")
