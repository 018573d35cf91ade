"""AutoUnit with precision="fp16", and the schedule of the unit with step_lr_interval="step"."""
import torch
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.train import train as train_unit
from works import NeedsGpu, Work


class Unit(AutoUnit):
    def __init__(self, work: Work, **options):
        self.work = work
        super().__init__(**options)

    def compute_loss(self, state, data):
        input, target = data
        output = self.module(input)
        return self.work.loss(output, target), output

    def configure_optimizers_and_lr_scheduler(self, module):
        optimizer = self.work.make_optimizer(module.parameters())
        return optimizer, self.work.make_schedule(optimizer)


def train(work: Work, model, tape):
    unit = Unit(work, module=model, device=torch.device("cpu"), precision="fp16", step_lr_interval="step")
    if not unit.grad_scaler.is_enabled():
        raise NeedsGpu("the loss scale of AutoUnit is for CUDA, and is off on a CPU, where the gradients stay unscaled")
    train_unit(unit, work.train_loader(), max_epochs=work.epochs)
