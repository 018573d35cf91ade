"""docs/examples/tensor_parallel: a third-party `Parallel` that divides layers trains as a single process does."""
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import UsageError, fit
from loopctl.cli.models import vit

FILE = Path(__file__).parents[2] / "docs" / "examples" / "tensor_parallel" / "tensor_parallel.py"
SPEC = f"{FILE}:TensorParallel"


def train(plugins, out=".", resume=None, epochs=2, model=None):
    """The full weights, the history, and the number of elements of the first MLP layer that this process has."""
    torch.manual_seed(0)
    model = model or vit(3, 1, 8, width=16, depth=2, heads=2).double()
    data = TensorDataset(torch.randn(36, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (36,)))
    run = fit(model, nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=0.01), DataLoader(data, 8, shuffle=True), DataLoader(data, 12), epochs=epochs,
              plugins=plugins, seed=0, out=out, resume=resume, max_steps=None)
    first = run.model.encoder.layers.encoder_layer_0.mlp[0].weight
    return ({name: getattr(value, "full_tensor", value.clone)() for name, value in run.model.state_dict().items()}, run.history,
            getattr(first, "to_local", lambda: first)().numel())


def test_two_processes_with_half_of_each_layer_train_as_one_with_the_whole(ranks):
    whole, history, held = train([])
    for weights, rows, part in ranks(2, train, [SPEC]):
        assert part == held // 2
        for row, expected in zip(rows, history, strict=True):
            assert row == pytest.approx(expected, abs=1e-10)                    # sums are in another order
        for name, value in whole.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-8, atol=1e-10)


def test_a_run_resumes_with_the_same_bits_from_a_checkpoint_in_shards(ranks, tmp_path):
    whole = ranks(2, train, [SPEC, "checkpoint"], tmp_path / "whole", None, 3)
    ranks(2, train, [SPEC, "checkpoint:every_steps=2"], tmp_path / "part", None, 2)
    assert [*(tmp_path / "part" / "checkpoints").glob("*.sharded")]
    for (weights, rows, _), (expected, history, _) in zip(ranks(2, train, [SPEC, "checkpoint:every_steps=2"], tmp_path / "part", tmp_path / "part", 3), whole, strict=True):
        assert rows == history
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_hidden_units_that_cannot_be_shared_are_refused(ranks):
    with pytest.raises(UsageError, match="has 32 hidden units, which 3 processes cannot share equally"):
        ranks(3, train, [SPEC])


def test_the_example_is_short():
    assert len(FILE.read_text().splitlines()) <= 60
