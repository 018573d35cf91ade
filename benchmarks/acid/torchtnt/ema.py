"""AutoUnit with SWAParams(averaging_method="ema"), which counts steps where step_lr_interval is "step"."""
import torch
from torchtnt.framework.auto_unit import AutoUnit, SWAParams
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
    average = SWAParams(warmup_steps_or_epochs=0, step_or_epoch_update_freq=1, averaging_method="ema",
                        ema_decay=work.ema_decay)
    unit = Unit(work, module=model, device=torch.device("cpu"), gradient_accumulation_steps=work.accumulate,
                step_lr_interval="step", swa_params=average)
    train_unit(unit, work.train_loader(), max_epochs=work.epochs)
    averaged = unit.swa_model.module.eval()
    with torch.no_grad():
        input, target = work.valid_data.tensors
        loss = work.loss(averaged(input), target).item()
    return {"average": torch.cat([weight.flatten() for weight in averaged.parameters()]), "valid_loss": loss}
