"""No plugin makes the host wait for the device within a step.

The plugins train on the meta device, where tensors have no values, so that any read of a value raises an error.
"""
import warnings

import pytest
import torch
from torch import nn

from loopctl import Run, available, fit, hookimpl
from tests.conftest import data_for, sync_debug_mode

# Autocast, CUDA graphs and collectives do not support the meta device. nan_guard and spike have tests in their own files. lr_finder reads
# losses, but of a copy of the model, before the first step; it implements no hook of a step. confusion needs validation data.
EXCLUDED = {"amp", "confusion", "cudagraph", "fsdp", "lr_finder", "nan_guard", "spike"}
STEPS = 20


class EnoughSteps(Exception):
    pass


class RaiseAfterSteps:
    @hookimpl
    def safe_point(self, run: Run):
        if run.attempts == STEPS:
            raise EnoughSteps


@pytest.mark.parametrize("name", sorted({*available()} - EXCLUDED))
def test_a_plugin_reads_no_tensor_value_within_a_step(name, example, batches, tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).to("meta")
    (data,) = data_for([example(name)], model, batches[:7] * 9)
    with pytest.raises(EnoughSteps):
        fit(model, nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), data,
            epochs=4, plugins=[example(name), RaiseAfterSteps()], metrics={"right": lambda output, target: (output.argmax(1) == target).float().mean()},
            out=tmp_path)


def test_a_plugin_that_reads_a_tensor_value_is_found(batches):
    class Reads:
        @hookimpl
        def after_step(self, run: Run):
            run.loss.item()

    with pytest.raises(RuntimeError, match="meta"):
        fit(nn.Linear(6, 3).to("meta"), nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1), batches,
            plugins=[Reads()])


def test_the_sync_debug_mode_of_the_tests_is_set_without_a_warning_and_restored_after_an_error(monkeypatch):
    """A stand-in for torch's function, which warns in every call."""
    modes = []

    def set_sync_debug_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all operations", stacklevel=2)

    def waits():
        with sync_debug_mode() as set_mode:
            set_mode("error")
            raise EnoughSteps

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    with pytest.raises(EnoughSteps):
        waits()
    assert modes == ["error", "default"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(available()))
def test_a_plugin_does_not_synchronize_with_cuda_within_a_step(name, example, batches, tmp_path):
    """By torch's sync debug mode, from step 10 on: what a run does once, in its first steps, may synchronize."""
    class ForbidSynchronizing:
        @hookimpl
        def safe_point(self, run: Run):
            set_mode("error" if run.attempts in range(10, STEPS) else "default")

    data = [(input.cuda(), target.cuda()) for input, target in batches[:7]] * 9
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).cuda()
    # Not float16, which synchronizes once per step, as GradScaler does, to know whether the step is skipped.
    spec = "amp:dtype=bfloat16" if name == "amp" else example(name)
    with sync_debug_mode() as set_mode:
        run = fit(model, nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True), data,
                  epochs=2, plugins=[spec, ForbidSynchronizing()], out=tmp_path)
    assert run.attempts >= STEPS
