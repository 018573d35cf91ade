"""A TrainUnit, whose train_step is the user's: AutoUnit steps without a closure."""
import torch
from torchtnt.framework.state import State
from torchtnt.framework.train import train as train_unit
from torchtnt.framework.unit import TrainUnit
from works import Work

Batch = tuple[torch.Tensor, torch.Tensor]


class Unit(TrainUnit[Batch]):
    def __init__(self, work: Work, module):
        super().__init__()
        self.work, self.module, self.optimizer = work, module, work.make_optimizer(module.parameters())

    def train_step(self, state: State, data: Batch):
        input, target = data

        def closure():
            self.optimizer.zero_grad()
            loss = self.work.loss(self.module(input), target)
            loss.backward()
            return loss
        self.optimizer.step(closure)


def train(work: Work, model, tape):
    train_unit(Unit(work, model), work.train_loader(), max_epochs=work.epochs)
