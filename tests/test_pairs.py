"""Every plugin trains alone and with every other plugin; both orders of a pair give the same weights."""
from itertools import combinations, permutations

import pytest
from torch import nn

from loopctl import UsageError, available, fit
from tests.conftest import data_for, discard_compiled

NAMES = sorted({*available()} - {"cudagraph"})        # cudagraph needs a GPU; its test file combines it with the others
pytestmark = pytest.mark.usefixtures("undrawn")
REFUSED = {
    ("activation_checkpointing", "compile"): "use backend=aot_eager",
    ("amp", "bf16"): "leave out one of the two",
    ("amp", "sam"): "one gradient computation per step",
    ("bf16", "fsdp"): "use fsdp:param_dtype",
    ("cyclic", "onecycle"): "cycles the momentum too",
    ("ddp", "fsdp"): "choose one",
    ("ddp", "local_sgd"): "choose one",
    ("float8", "fsdp"): "shards the weights",
    ("float8", "lora"): "replaces the layers",
    ("float8", "qat"): "the same layers in float8",
    ("freeze", "fsdp"): "frozen for a while, which fully_shard does not support",
    ("fsdp", "lr_finder"): "cannot be copied",
    ("fsdp", "local_sgd"): "choose one",
    ("fsdp", "lora"): "shards the weights",
    ("fsdp", "prune"): "the weights are sharded",
    ("fsdp", "qat"): "shards the weights",
    ("lora", "prune"): "sets weights to 0",
    ("lora", "qat"): "would round the matrices apart",
    ("nan_guard", "spike"): "would undo the same steps",
}
# The order of a pair matters:
ORDERED = {
    ("agc", "clip"),                # each measures the gradient that the other has left
    ("grad_centralize", "spike"),   # spike judges the gradient that it meets
    ("ema", "swa"),                 # the averaged weights of the last one are evaluated and kept
    # Each changes the batch that the other has left.
    *combinations(["cutmix", "progressive_resizing", "selective_backprop"], 2),
    ("mixup", "progressive_resizing"),
    ("mixup", "selective_backprop"),
}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Keep compiled code for the next pair, until torch would soon stop compiling: most pairs compile the same."""
    yield
    discard_compiled(32)


def train(net, batches, valid, sgd, plugins, out):
    plugins = [*plugins]
    images = data_for(plugins, net, batches, valid)
    if images[0] is not batches:
        plugins = ["distill:teacher=tests.conftest:teacher_of_images" if plugin.startswith("distill") else plugin for plugin in plugins]
    batches, valid = images
    batches = [*batches[:4], tuple(part[:6] for part in batches[4])]      # an even last batch: `split` must not give BatchNorm a single sample
    return fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=2, plugins=plugins, seed=1, out=out)


@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_trains_alone(net, batches, valid, sgd, example, tmp_path, name):
    assert train(net, batches, valid, sgd, [example(name)], tmp_path).epoch == 2


@pytest.mark.parametrize("pair", list(combinations(NAMES, 2)), ids="+".join)
def test_both_orders_of_a_pair_give_the_same_weights_or_are_refused(net, batches, valid, sgd, clone, same, example, tmp_path, pair):
    """The weights are equal bit for bit. Pairs in REFUSED raise UsageError."""
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
