"""Every plugin, and every pair of plugins in both orders, trains; and those whose order cannot matter end alike."""
from itertools import combinations, permutations

import pytest
from torch import nn

from loopctl import available, fit

NAMES = sorted(available())
SPEC = {"accumulate": "accumulate:every=3", "amp": "amp:dtype=float16", "clip": "clip:max_norm=0.1", "warmup": "warmup:length=50%",
        "early_stopping": "early_stopping:patience=1,min_delta=9,restore_best=true"}


def train(net, batches, valid, sgd, names, out):
    plugins = [SPEC.get(name, name) for name in names]
    return fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=2, plugins=plugins, seed=1, out=out)


@pytest.mark.parametrize("name", NAMES)
def test_alone(net, batches, valid, sgd, tmp_path, name):
    assert train(net, batches, valid, sgd, [name], tmp_path).epoch == 2


@pytest.mark.parametrize("pair", list(combinations(NAMES, 2)), ids="+".join)
def test_in_pairs_the_order_does_not_matter(net, batches, valid, sgd, clone, same, tmp_path, pair):
    """None of these does at one moment what another undoes, so that both orders give the same bits."""
    models = []
    for number, names in enumerate(permutations(pair)):
        models.append(clone(net))
        run = train(models[-1], batches, valid, sgd, names, tmp_path / str(number))
        assert run.step > 0
    same(*models)
