"""Each process of a run writes a tape of its own."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import fit
from loopctl.tape.reading import read_tape
from loopctl.testing.tiny import tiny_batches


def train_in_processes(plugin, folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), tiny_batches(8, 8, 8, 4), plugins=[plugin, "tape"], seed=1, out=folder)


@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
def test_each_of_two_processes_writes_a_tape(ranks, tmp_path, plugin):
    """With ddp, of other batches and the same weights; with fsdp, each of its part of the weights."""
    ranks(2, train_in_processes, plugin, tmp_path)
    tapes = [read_tape(tmp_path / name) for name in ("run.tape", "run.1.tape")]
    assert [tape.header["rank"] for tape in tapes] == [0, 1]
    assert len(tapes[0].updates) == len(tapes[1].updates) == 2
    for one, two in zip(*tapes, strict=True):
        assert one.table("batch", "1") != two.table("batch", "1")
        assert one.table("gradients", "backward").norm > 0
        assert one.values["changed_by"] == two.values["changed_by"] == []
        same = [one.table(what, point) == two.table(what, point) for what, point in (("weights", "start"), ("weights", "end"), ("gradients", "backward"))]
        assert same == [plugin == "ddp"] * 3
    for tape in tapes:
        assert tape.updates[1].table("weights", "end") == tape.updates[2].table("weights", "start")
