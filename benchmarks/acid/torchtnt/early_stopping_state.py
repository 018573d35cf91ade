"""EarlyStopChecker as an attribute of the unit, so that checkpoints have its state, asked after each evaluation."""
import torch
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.callbacks import DistributedCheckpointSaver, Lambda
from torchtnt.framework.fit import fit
from torchtnt.utils.early_stop_checker import EarlyStopChecker
from works import Work


class Unit(AutoUnit):
    def __init__(self, work: Work, **options):
        super().__init__(**options)
        self.work, self.checker = work, EarlyStopChecker("min", work.patience)

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


def stop_if_not_better(state, unit):
    if unit.checker.check(unit.total / unit.samples):
        state.stop()


def train(work: Work, model, tape):
    unit = Unit(work, module=model, device=torch.device("cpu"))
    saver = DistributedCheckpointSaver(str(work.folder), async_checkpoint=False)         # saves when training ends
    if work.part == 2:
        saver.restore_from_latest(str(work.folder), unit)
        tape.attempts -= 1          # restoring calls optimizer.step once with zero gradients, which is no update
    fit(unit, work.train_loader(), work.valid_loader(), evaluate_every_n_epochs=1,
        max_epochs=work.stop_after if work.part == 1 else work.epochs,
        callbacks=[Lambda(on_eval_epoch_end=stop_if_not_better), saver])
    return {"epochs": unit.train_progress.num_epochs_completed}
