"""AutoUnit, a checkpoint in mid-epoch, and torchdata's StatefulDataLoader, whose state the checkpoint has."""
from contextlib import suppress

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.callbacks import DistributedCheckpointSaver, Lambda
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
        optimizer = self.work.make_optimizer(module.parameters())
        return optimizer, self.work.make_schedule(optimizer)


class Interrupted(Exception):
    pass


def train(work: Work, model, tape):
    def interrupt(state, unit):
        if work.part == 1 and unit.train_progress.num_steps_completed == work.stop_after:
            raise Interrupted

    unit = Unit(work, module=model, device=torch.device("cpu"), step_lr_interval="step")
    loader = StatefulDataLoader(work.train_data, work.batch_size)
    saver = DistributedCheckpointSaver(str(work.folder), save_every_n_train_steps=work.stop_after,
                                       async_checkpoint=False)
    if work.part == 2:
        saver.restore_from_latest(str(work.folder), unit, train_dataloader=loader)
        tape.attempts -= 1          # restoring calls optimizer.step once with zero gradients, which is no update
    with suppress(Interrupted):
        train_unit(unit, loader, max_epochs=work.epochs, callbacks=[saver, Lambda(on_train_step_end=interrupt)])
