"""Every plugin, and every pair of plugins in both orders, trains; and those whose order cannot matter end alike."""
from itertools import combinations, permutations

import pytest
from torch import nn

from loopctl import UsageError, available, fit

NAMES = sorted({*available()} - {"cudagraph"})        # which needs a GPU, and has its own test of every other
REFUSED = {("cyclic", "onecycle"): "cycles the momentum too", ("amp", "sam"): "one computation of gradients per step",
           ("ddp", "fsdp"): "choose one", ("freeze", "fsdp"): "frozen for a while only", ("fsdp", "lr_finder"): "cannot be copied"}
ORDERED = {("ema", "swa")}        # two averages: the one given last is evaluated and kept


def train(net, batches, valid, sgd, plugins, out):
    batches = [*batches[:7], tuple(part[:6] for part in batches[6])]      # `split` leaves BatchNorm no lone sample
    return fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=2, plugins=plugins, seed=1, out=out)


@pytest.mark.parametrize("name", NAMES)
def test_alone(net, batches, valid, sgd, example, tmp_path, name):
    assert train(net, batches, valid, sgd, [example(name)], tmp_path).epoch == 2


@pytest.mark.parametrize("pair", list(combinations(NAMES, 2)), ids="+".join)
def test_in_pairs_the_order_does_not_matter(net, batches, valid, sgd, clone, same, example, tmp_path, pair):
    """None of these does at one moment what another undoes, so that both orders give the same bits."""
    if pair in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[pair]):
            train(net, batches, valid, sgd, map(example, pair), tmp_path)
        return
    models = []
    for number, names in enumerate(permutations(pair)):
        models.append(clone(net))
        run = train(models[-1], batches, valid, sgd, map(example, names), tmp_path / str(number))
        assert run.step > 0
    if pair not in ORDERED:
        same(*models)
