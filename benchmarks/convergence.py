"""Not only equal, but good: validation accuracy of documented recipes on digits, over five seeds.

    python benchmarks/convergence.py

For `ema` and `swa` the raw weights of the same run are evaluated too. Prints the table of docs/performance.md.
"""
import copy
from functools import partial
from statistics import mean

import torch
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.cli import data, models
from loopctl.metrics.named import accuracy
from loopctl.model.eval_mode import eval_mode

FEATURED = ["amp", "accumulate:every=2", "clip:max_norm=1", "warmup:length=10%", "cosine:by=step"]
RECIPES = {
    "(no plugin)": [],
    "amp, cosine": ["amp", "cosine"],
    "amp, accumulate, clip, warmup, cosine": FEATURED,
    "amp, accumulate, clip, warmup, cosine, ema": [*FEATURED, "ema:decay=0.99"],
    "ema": ["ema:decay=0.99"],
    "swa": ["swa:start=50%"],
    "swa with swa_lr": ["swa:start=50%,swa_lr=0.001,anneal_epochs=2"],
    "sam": ["sam"],
}


class Raw:
    """Keeps the raw weights of the end, before an average takes their place."""

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        self.model = copy.deepcopy(run.model)


def scores(model: nn.Module, batches: list) -> tuple[float, float]:
    with eval_mode(model), torch.no_grad():
        outputs = torch.cat([model(input) for input, _ in batches])
    targets = torch.cat([target for _, target in batches])
    return accuracy(outputs, targets).item(), nn.functional.cross_entropy(outputs, targets).item()


def main(seeds: int = 5, epochs: int = 20) -> None:
    torch.set_num_threads(1)
    digits = data.digits()
    print("| recipe | accuracy, mean | lowest | loss | raw weights: accuracy, loss |\n|---|---|---|---|---|")
    for name, plugins in RECIPES.items():
        kept, raws = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = models.make("cnn", digits)
            train, valid = digits.loaders(64, 0, torch.device("cpu"))
            raw = Raw()
            fit(model, nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=1e-3), train, epochs=epochs,
                plugins=[*plugins, raw], seed=seed)
            kept.append(scores(model, list(valid)))
            raws.append(scores(raw.model, list(valid)))
        averaged = any(plugin.startswith(("ema", "swa")) for plugin in plugins)
        beside = f"{mean(a for a, _ in raws):.4f}, {mean(loss for _, loss in raws):.4f}" if averaged else ""
        accuracies = [a for a, _ in kept]
        loss = mean(loss for _, loss in kept)
        print(f"| {name} | {mean(accuracies):.4f} | {min(accuracies):.4f} | {loss:.4f} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
