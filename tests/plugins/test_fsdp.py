"""Each process has a piece of every weight, and the run is the one that ddp makes."""
import pytest
import torch
from torch import nn

from loopctl import fit

LOSS = nn.CrossEntropyLoss()
UNEVEN = [8, 8, 8, 4, 8, 8, 6]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, input):
        return input + torch.tanh(self.inner(self.norm(input)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), Block(), Block(), nn.BatchNorm1d(16), nn.Linear(16, 3)).double()


def batches(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=random, dtype=torch.float64), torch.randint(0, 3, (size,), generator=random)) for size in sizes]


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01)


class Watch:
    def __init__(self):
        self.losses, self.held = [], 0

    from loopctl import hookimpl

    @hookimpl
    def after_step(self, run):
        self.losses.append(run.loss.item())


def trained(spec, plugins, epochs, **settings):
    watch = Watch()
    run = fit(network(), LOSS, adamw, batches(*UNEVEN), batches(8, 5, 7, seed=1), epochs=epochs, plugins=[spec, *plugins, watch],
              metrics={}, seed=0, **settings)
    tensors = [*run.model.parameters(), *(one for state in run.optimizer.state.values() for one in state.values())]
    held = sum(getattr(one, "_local_tensor", one).numel() for one in tensors if one.ndim)
    whole = {name: getattr(value, "full_tensor", value.clone)() for name, value in run.model.state_dict().items()}
    return whole, run.history, watch.losses, held


@pytest.mark.parametrize("plugins", [[], ["accumulate:every=2"], ["clip:max_norm=0.1"], ["ema:decay=0.9"], ["swa:start=50%"], ["amp"],
    ["amp:dtype=float16"], ["sam"], ["nan_guard"], ["early_stopping:restore_best=true"], ["split"], ["freeze:patterns=0"], ["freeze:patterns=0,until=2ep"],["layerwise_lr:decay=0.5"], ["clip:value=0.01"], ["summary"], ["throughput"], ["channels_last"], ["compile:backend=eager"], ["lr_finder:num_steps=5"], ["torch_scheduler:cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9"], ["onecycle:max_lr=0.1"], ["plateau"]], ids=",".join)
def test_the_losses_are_those_of_ddp(ranks, plugins):
    there = ranks(2, trained, "fsdp", plugins, 5)
    here = ranks(2, trained, "ddp", plugins, 5)
    for one, other in zip(there, here, strict=True):
        assert one[2] == pytest.approx(other[2], abs=1e-6)
        for name in one[0]:
            torch.testing.assert_close(one[0][name], other[0][name], rtol=1e-4, atol=1e-5)
    print(there[0][3] / here[0][3])
