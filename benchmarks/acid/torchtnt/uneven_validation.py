"""AutoUnit in fit; its hook on_eval_step_end gets the loss of a batch, and the mean over them is the user's."""
import torch
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.fit import fit
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

    def on_eval_epoch_start(self, state):
        self.total, self.samples = 0.0, 0

    def on_eval_step_end(self, state, data, step, loss, outputs):
        self.total += loss.item() * len(outputs)
        self.samples += len(outputs)


def train(work: Work, model, tape):
    unit = Unit(work, module=model, device=torch.device("cpu"))
    fit(unit, work.train_loader(), work.valid_loader(), max_epochs=work.epochs, evaluate_every_n_epochs=1)
    return {"valid_loss": unit.total / unit.samples}
