"""The names of parameter groups, and what a run shows of their learning rates."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import fit
from loopctl.composition.explain import describe_plan
from loopctl.loop import DEFAULTS
from loopctl.optim.learning_rate import group_names
from loopctl.prepare import build_run
from loopctl.report.charts import curves

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1)


def optimizer_of(net, *groups):
    """An optimizer with a group for the last layer of `net`, and one before it for the others, with these keys."""
    parts = nn.ModuleList(net[:-1]), net[-1]
    return torch.optim.SGD([{"params": part.parameters(), **group} for part, group in zip(parts, groups, strict=True)], lr=0.1)


@pytest.mark.parametrize(("given", "names"), [
    ([{}, {}], ["0", "1"]), ([{"name": "body"}, {"name": "head"}], ["body", "head"]), ([{}, {"name": "head"}], ["0", "head"]),
    ([{"name": "a"}, {"name": "a"}], ["a (0)", "a (1)"]), ([{"name": ""}, {"name": "a\nb\x1b"}], ["0", "a b\\x1b"]),
])
def test_a_group_has_its_name_or_its_number(given, names):
    assert group_names(optimizer_of([nn.Linear(2, 2), nn.Linear(2, 2)], *given)) == names


def test_the_history_has_the_rate_of_every_group_where_they_differ(net, batches, valid):
    run = fit(net, cross_entropy, optimizer_of(net, {"name": "body"}, {"name": "head", "lr": 0.2}), batches, valid, epochs=2,
              plugins=["linear:start_factor=1,end_factor=0.5,total_iters=1"])
    assert [{key: row[key] for key in row if key.startswith("lr")} for row in run.history] == [
        {"lr": 0.1, "lr_body": 0.1, "lr_head": 0.2}, {"lr": 0.05, "lr_body": 0.05, "lr_head": 0.1}]
    assert {name: [line.name for line in lines] for name, lines in curves(run.history).items()}["lr"] == ["body", "head"]


def test_groups_whose_rates_are_equal_are_one_column(net, batches):
    run = fit(net, cross_entropy, optimizer_of(net, {"name": "body"}, {"name": "head"}), batches)
    assert [key for key in run.history[0] if key.startswith("lr")] == ["lr"]


def test_groups_whose_rates_meet_keep_their_columns(net, batches):
    run = fit(net, cross_entropy, optimizer_of(net, {}, {"lr": 0.2}), batches, plugins=["constant:factor=0,total_iters=99"])
    assert [run.history[0][key] for key in ("lr", "lr_0", "lr_1")] == [0, 0, 0]


def test_explain_has_a_line_for_each_curve(net, batches):
    run = build_run(DEFAULTS, ["layerwise_lr:rates=4.*=x10,no_decay=true"], None, None, None, model=net, loss_fn=cross_entropy, optimizer=sgd,
                    train=batches)
    assert describe_plan(run)[-2:] == [
        "learning rate    groups rest and rest (no decay): 0.1 at the start, 0.1 at its peak, 0.1 at the end",
        "                 groups 4.* and 4.* (no decay): 1 at the start, 1 at its peak, 1 at the end"]


def test_a_checkpoint_without_names_or_with_others_leaves_the_names_of_the_run(net, batches, clone, same, tmp_path):
    whole, other = clone(net), clone(net)
    fit(whole, cross_entropy, sgd_of(whole), batches, epochs=2, seed=1)
    fit(net, cross_entropy, sgd_of(net, "old"), batches, epochs=1, plugins=["checkpoint"], out=tmp_path, seed=1)
    run = fit(other, cross_entropy, sgd_of(other, None, "head"), batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path, seed=1)
    assert group_names(run.optimizer) == ["old", "head"]
    same(other, whole)


def sgd_of(net, *names):
    groups = [{"name": name} if name else {} for name in (*names, None, None)[:2]]
    return optimizer_of(net, *groups)
