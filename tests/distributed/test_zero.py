"""ddp:zero=true: the optimizer's state is divided among the processes, and nothing else differs."""
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from loopctl import UsageError, fit

LOSS = nn.CrossEntropyLoss()
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(number):
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=random), torch.randint(0, 3, (8,), generator=random)) for _ in range(number)]


def train(spec, plugins, epochs=3, out=".", resume=None):
    """The weights, the losses of the history, and the number of elements of the optimizer's state in this process."""
    run = fit(network(), LOSS, ADAMW, batches(8), epochs=epochs, plugins=[spec, *plugins], seed=0, out=out, resume=resume)
    held = sum(value.numel() for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return {name: value.clone() for name, value in run.model.state_dict().items()}, [row["train_loss"] for row in run.history], held


def train_by_hand():
    dist.init_process_group("gloo")
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    for _ in range(3):
        for input, target in batches(8)[dist.get_rank()::2]:
            optimizer.zero_grad()
            LOSS(model(input), target).backward()
            optimizer.step()
    dist.destroy_process_group()
    return {name: value.clone() for name, value in model.module.state_dict().items()}


@pytest.mark.compares(use="ddp:zero", technique="optimizer state divided among processes", source="torch.distributed.optim.ZeroRedundancyOptimizer", tolerance="to the bit")
def test_the_weights_are_those_of_a_plain_loop_with_torchs_optimizer(ranks):
    for (weights, _, _), expected in zip(ranks(2, train, "ddp:zero=true", []), ranks(2, train_by_hand), strict=True):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


WITH = {"plain": [], "groups": ["layerwise_lr:decay=0.5,no_decay=true", "warmup:length=50%", "clip:max_norm=0.1", "accumulate:every=2", "ema:decay=0.9"],
        "float16": ["amp:dtype=float16", "ema"], "sam": ["nan_guard", "sam"], "frozen": ["freeze:patterns=0,until=1ep"]}


@pytest.mark.parametrize("case", WITH)
def test_nothing_but_the_memory_differs_from_ddp(ranks, case):
    divided, whole = ranks(2, train, "ddp:zero=true", WITH[case]), ranks(2, train, "ddp", WITH[case])
    for (weights, losses, _), (expected, expected_losses, _) in zip(divided, whole, strict=True):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert losses == expected_losses
    assert sum(held for _, _, held in divided) == whole[0][2]
    assert max(held for _, _, held in divided) < 0.7 * whole[0][2]


def test_a_checkpoint_is_whole_and_resumes_with_the_same_bits_in_any_number_of_processes(ranks, tmp_path):
    whole = ranks(2, train, "ddp:zero=true", ["checkpoint"], 3, tmp_path / "whole")
    ranks(2, train, "ddp:zero=true", ["checkpoint"], 2, tmp_path / "part")
    saved, expected = (torch.load(tmp_path / folder / "checkpoints" / "step-00000008.pt", weights_only=True)["optimizer"] for folder in ("part", "whole"))
    assert saved["class"] == "AdamW"
    assert len(saved["state"]) == 6
    assert saved["param_groups"] == expected["param_groups"]
    for spec, number in (("ddp:zero=true", 2), ("ddp", 2), ("ddp:zero=true", 3), ("ddp:zero=true", 1)):
        out = tmp_path / f"{number} {spec[3:]}"
        shutil.copytree(tmp_path / "part", out)
        for weights, losses, _ in ranks(number, train, spec, ["checkpoint"], 3, out, out):
            assert len(losses) == 3
            if number == 2:
                assert losses == whole[0][1]
                assert all(torch.equal(weights[name], whole[0][0][name]) for name in weights)


def refused(kind):
    model = network()
    given = {"made": torch.optim.SGD(model.parameters(), lr=0.1), "several": {"0": ADAMW, "*": ADAMW}, "lbfgs": partial(torch.optim.LBFGS, lr=0.1)}
    fit(model, LOSS, given[kind], batches(8), plugins=["ddp:zero=true"], seed=0)


@pytest.mark.parametrize(("kind", "reason"), [("made", "one optimizer that does not exist yet"), ("several", "one optimizer that does not exist yet"),
                                              ("lbfgs", "LBFGS looks along one direction")])
def test_optimizers_whose_state_cannot_be_divided_are_refused(ranks, kind, reason):
    with pytest.raises(UsageError, match=reason):
        ranks(2, refused, kind)
