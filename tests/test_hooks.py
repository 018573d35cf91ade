"""The hooks that a run calls, and their specs, agree with the hook tree."""
import inspect

import pytest
from torch import nn

from loopctl import fit, hooks
from loopctl.composition.compose import SPECS
from loopctl.composition.explain import hook_tree
from loopctl.testing import Trace


def test_a_traced_run_calls_the_hooks_in_the_order_of_the_tree(net, batches, valid, sgd):
    """A run of one epoch with one step calls each line of the tree once, apart from the trial of the first batch of valid."""
    trace = Trace()
    fit(net, nn.CrossEntropyLoss(), sgd, batches[:1], valid[:1], plugins=[trace])
    trial = trace.lines.index("    after_backward") + 1
    assert [line.strip() for line in trace.lines[trial:trial + 3]] == ["batch_weight", "compute_loss", "grads_ready"]
    del trace.lines[trial:trial + 2]
    evaluation = trace.lines.index("  evaluate")
    assert trace.lines[evaluation + 1:evaluation + 3] == ["    batch_weight", "    compute_loss"]     # for the one batch of valid
    called = [line.strip() for line in trace.lines[:evaluation + 1] + trace.lines[evaluation + 3:]]
    assert called == [line.split()[0] for line in hook_tree()]


def test_hooks_of_a_step_with_two_micro_batches_are_nested_as_in_the_tree(net, batches, sgd):
    trace = Trace()
    fit(net, nn.CrossEntropyLoss(), sgd, batches[:2], plugins=[trace, "accumulate:every=2"])
    step = trace.lines.index("  optimizer_step")
    assert trace.lines[step:step + 9] == [
        "  optimizer_step",
        "    micro_step", "      compute_loss", "      backward",
        "    micro_step", "      compute_loss", "      backward",
        "    after_backward", "    grads_ready"]


def test_the_tree_lists_every_hook():
    assert {line.split()[0] for line in hook_tree()} == set(SPECS)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_hook_has_a_docstring_a_return_annotation_and_run_as_first_argument(name):
    spec = SPECS[name]
    assert spec.__doc__
    assert inspect.signature(spec).return_annotation != inspect.Signature.empty
    assert next(iter(inspect.signature(spec).parameters)) == "run"


def test_every_hook_with_a_return_value_can_be_replaced_except_those_of_several_plugins():
    replaced = {name for name, spec in SPECS.items() if spec.loopctl_spec["firstresult"]}
    returning = {name for name, spec in SPECS.items() if spec.__annotations__["return"] != "None"}
    assert returning - replaced == {"lr_scale", "transform_batch"}
    assert replaced - returning == {"train"}


def test_the_module_docstring_starts_with_a_heading():
    assert hooks.__doc__.startswith("The hooks: every point of training")
