"""AutoUnit with gradient_accumulation_steps."""
import torch
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.train import train as train_unit
from works import Work


class Unit(AutoUnit):
    def __init__(self, work: Work, **options):
        self.work = work
        super().__init__(**options)

    def compute_loss(self, state, data):
        input, target = data
        output = self.module(input)
        return self.work.loss(output, target), output

    def configure_optimizers_and_lr_scheduler(self, module):
        return self.work.make_optimizer(module.parameters()), None


def train(work: Work, model, tape):
    unit = Unit(work, module=model, device=torch.device("cpu"), gradient_accumulation_steps=work.accumulate)
    train_unit(unit, work.train_loader(), max_epochs=work.epochs)
