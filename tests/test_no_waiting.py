"""No plugin makes the host wait for the device within a step.

On the meta device tensors have no values, so that reading one is an error, whatever way it is read.
"""
import pytest
import torch
from torch import nn

from loopctl import Run, available, fit, hookimpl

# autocast and CUDA graphs know no meta device. What nan_guard does with a GPU is tested there in its own file. lr_finder
# reads every loss, of a copy, before the first step, and joins no moment within one. No processes talk about meta tensors.
ELSEWHERE = {"amp", "cudagraph", "fsdp", "lr_finder", "nan_guard"}
STEPS = 20


class Enough(Exception):
    pass


class Leave:
    @hookimpl
    def safe_point(self, run: Run):
        if run.attempts == STEPS:
            raise Enough


@pytest.mark.parametrize("name", sorted({*available()} - ELSEWHERE))
def test_on_a_device_without_values(name, example, batches, tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).to("meta")
    data = batches[:7] * 9
    with pytest.raises(Enough):
        fit(model, nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), data,
            epochs=4, plugins=[example(name), Leave()], metrics={"right": lambda output, target: (output.argmax(1) == target).float().mean()},
            out=tmp_path)


def test_this_finds_a_plugin_that_reads(batches):
    class Reads:
        @hookimpl
        def after_step(self, run: Run):
            run.loss.item()

    with pytest.raises(RuntimeError, match="meta"):
        fit(nn.Linear(6, 3).to("meta"), nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1), batches,
            plugins=[Reads()])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(available()))
def test_on_cuda(name, example, batches, tmp_path):
    """As torch sees it. What a run does once, in its first steps, may wait."""
    class Watch:
        @hookimpl(wrapper=True)
        def train(self):
            try:
                return (yield)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        @hookimpl
        def safe_point(self, run: Run):
            torch.cuda.set_sync_debug_mode("error" if run.attempts in range(10, STEPS) else "default")

    data = [(input.cuda(), target.cuda()) for input, target in batches[:7]] * 9
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).cuda()
    # float16 waits once a step, as GradScaler does: whether the step was skipped decides what counts.
    spec = "amp:dtype=bfloat16" if name == "amp" else example(name)
    run = fit(model, nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True), data,
              epochs=2, plugins=[spec, Watch()], out=tmp_path)
    assert run.attempts >= STEPS
