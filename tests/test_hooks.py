"""The hook tree is what a run calls, and the specs say what the tree says."""
import inspect

import pytest
from torch import nn

from loopctl import fit, hooks
from loopctl.composition.compose import SPECS
from loopctl.composition.explain import hook_tree
from loopctl.testing import Trace


def test_a_traced_run_is_the_tree(net, batches, valid, sgd):
    """Name by name, in order: a run of one epoch of one step calls every line of the tree once, and nothing else."""
    trace = Trace()
    fit(net, nn.CrossEntropyLoss(), sgd, batches[:1], valid[:1], plugins=[trace])
    evaluation = trace.lines.index("  evaluate")
    assert trace.lines[evaluation + 1:evaluation + 3] == ["    batch_weight", "    compute_loss"]     # of valid's one batch
    called = [line.strip() for line in trace.lines[:evaluation + 1] + trace.lines[evaluation + 3:]]
    assert called == [line.split()[0] for line in hook_tree()]


def test_hooks_nest_as_the_tree_draws_them(net, batches, sgd):
    trace = Trace()
    fit(net, nn.CrossEntropyLoss(), sgd, batches[:2], plugins=[trace, "accumulate:every=2"])
    step = trace.lines.index("  optimizer_step")
    assert trace.lines[step:step + 9] == [
        "  optimizer_step",
        "    micro_step", "      compute_loss", "      backward",
        "    micro_step", "      compute_loss", "      backward",
        "    after_backward", "    grads_ready"]


def test_the_tree_names_every_hook():
    assert {line.split()[0] for line in hook_tree()} == set(SPECS)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_hook_says_when_it_is_called(name):
    spec = SPECS[name]
    assert spec.__doc__
    assert inspect.signature(spec).return_annotation != inspect.Signature.empty
    assert next(iter(inspect.signature(spec).parameters)) == "run"


def test_a_hook_that_returns_is_replaced_or_collects():
    replaced = {name for name, spec in SPECS.items() if spec.loopctl_spec["firstresult"]}
    returning = {name for name, spec in SPECS.items() if spec.__annotations__["return"] != "None"}
    assert returning - replaced == {"lr_scale"}
    assert replaced - returning == {"train"}


def test_the_module_docstring_is_what_the_command_prints():
    assert hooks.__doc__.startswith("Every moment of training")
