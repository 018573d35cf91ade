"""Pairs of runs that differ in a plugin: the explanation names it, and no other one."""
from dataclasses import dataclass

import pytest
import torch

from loopctl import hookimpl
from loopctl.testing import tiny_run
from loopctl.testing.checks import EXAMPLES
from loopctl.testing.tiny import tiny_model
from loopctl.why.causes import CAUSES
from loopctl.why.differences import explain_difference

TRAINING = ["agc", "amp", "bf16", "constant", "cosine", "cyclic", "distill", "exponential", "freeze", "grad_centralize", "inverse_sqrt",
            "lambda", "layerwise_lr", "linear", "multiplicative", "multistep", "onecycle", "polynomial", "prune", "selective_backprop",
            "split", "step", "torch_scheduler", "trapezoidal"]


@pytest.fixture(scope="module")
def plain():
    return tiny_run("tape").out / "run.tape"


def explained(plain, *plugins, **arguments):
    return explain_difference(plain, tiny_run("tape", *plugins, **arguments).out / "run.tape")


@dataclass(eq=False)
class Halves:
    """Halves the gradients from update 4 on."""

    @hookimpl
    def grads_ready(self, run):
        if run.attempts >= 3:
            for parameter in run.model.parameters():
                parameter.grad /= 2


@dataclass(eq=False)
class ShrinksWeights:
    """Multiplies the weights by 0.9 after the first epoch."""

    @hookimpl
    def epoch_end(self, run):
        if run.epoch == 1:
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.mul_(0.9)


@pytest.mark.parametrize(("plugin", "cause", "update", "words"), [
    ("clip:max_norm=0.5", "clipping", 1, "the plugin clip acted in B only (norm 1.3 → 0.5, in the same direction)"),
    ("grad_noise", "changed gradients", 1, "the plugin grad_noise acted in B only"),
    (Halves(), "clipping", 4, "the plugin halves acted in B only"),
    (ShrinksWeights(), "weights changed", 6, "by the plugin shrinks_weights in its hook epoch_end, in B only"),
    ("cosine", "schedule", 6, "The plugin cosine acts at lr_scale in B only"),
    ("warmup:length=4st", "schedule", 1, "The plugin warmup acts at lr_scale in B only"),
    ("accumulate:every=2", "grouping", 1, "B accumulates more of them"),
    ("amp:dtype=bfloat16", "dtype", 1, "bfloat16 in B"),
    ("sam", "plugin", 1, "The plugin sam acts at optimizer_step in B only"),
    ("label_smoothing", "plugin", 1, "label_smoothing"),
    ("mixup", "dtype", 1, "The plugin mixup acts at transform_batch in B only"),
    ("freeze:patterns=0.*", "missing gradients", 1, "B has no gradient for 0.weight and 0.bias"),
], ids=lambda value: value if isinstance(value, str) and " " not in value else "")
def test_a_plugin_in_one_of_two_runs_is_named(plain, plugin, cause, update, words):
    found = explained(plain, plugin)
    assert (found.cause, found.update) == (cause, update), found.text
    assert words in found.text
    name = plugin.partition(":")[0] if isinstance(plugin, str) else {Halves: "halves"}.get(type(plugin), "shrinks_weights")
    assert set(found.plugins) <= {name}


@pytest.mark.parametrize("name", TRAINING)
def test_no_other_plugin_is_named_and_none_is_certain_without_proof(plain, name):
    found = explained(plain, ":".join(filter(None, [name, EXAMPLES.get(name)])))
    assert not found.same
    assert found.plugins == (name,)
    assert name in found.text.partition("The configurations differ")[0]


@pytest.mark.parametrize("plugin", ["ema", "swa", "norms", "csv", "early_stopping", "clip:max_norm=inf"])
def test_a_plugin_that_changes_no_update_makes_no_difference(plain, plugin):
    assert explained(plain, plugin).same


def test_of_two_clips_the_limits_are_said(plain):
    one, other = (tiny_run("tape", f"clip:max_norm={norm}").out / "run.tape" for norm in (0.5, 0.25))
    found = explain_difference(one, other)
    assert (found.cause, found.plugins, found.certain) == ("clipping", ("clip",), True)
    assert "Cause: the limit of the norm is 0.5 in A and 0.25 in B." in found.text
    assert "The configurations differ: clip with max_norm=0.5 in A, max_norm=0.25 in B." in found.text


def test_the_random_numbers_of_another_seed_are_named(plain):
    found = explained(plain, seed=1)
    assert (found.cause, found.certain) == ("random numbers", False)
    assert "the random-number generator of torch is in another state before the first update" in found.text
    assert "seed 0 in A, 1 in B" in found.text


def test_a_shorter_run_is_the_same_up_to_its_end(plain):
    found = explained(plain, epochs=1)
    assert (found.cause, found.update) == ("length", 5)
    assert "B ends after update 5, and A goes on until update 10." in found.text


def test_random_numbers_that_an_evaluation_draws_are_found_there(plain):
    @dataclass(eq=False)
    class DrawsInEvaluation:
        @hookimpl(wrapper=True)
        def evaluate(self, run):
            torch.rand(3)
            return (yield)

    found = explained(plain, DrawsInEvaluation())
    assert (found.cause, found.update) == ("random numbers", 6)
    assert "is in another state after the evaluation that follows update 5" in found.text
    assert "The evaluation of B draws random numbers." in found.text


def test_the_first_module_that_differs_is_named():
    def model(scale):
        found = tiny_model()
        found[2].register_forward_hook(lambda module, inputs, output: output * scale)
        return found

    one, other = (tiny_run("tape:modules=true", model=model(scale)).out / "run.tape" for scale in (1.0, 1.01))
    found = explain_difference(one, other)
    assert found.cause == "forward pass"
    assert "the first module whose output differs is 2; the output of 1, called before it, is equal" in found.text


def test_every_cause_that_is_found_is_listed(plain):
    assert explained(plain, "clip:max_norm=0.5").cause in CAUSES


def test_micro_batches_that_count_otherwise_are_told_by_their_gradients(tmp_path):
    @dataclass(eq=False)
    class EachBatchTheSame:
        @hookimpl
        def batch_weight(self, run, batch):
            return 1

    one, other = (tiny_run("tape", "accumulate:every=3", *more).out / "run.tape" for more in ((), (EachBatchTheSame(),)))
    found = explain_difference(one, other)
    assert (found.cause, found.update) == ("weighting", 2), found.text
    assert "B gives each batch the same share, and A each sample: they have 8 and 5 samples." in found.text
