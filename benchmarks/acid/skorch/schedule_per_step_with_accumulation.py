"""The recipe for accumulation from skorch's FAQ, and its LRScheduler, which steps once per batch."""
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler
from torch.optim.lr_scheduler import LambdaLR
from works import Work


class GradAccNet(NeuralNetClassifier):
    def __init__(self, *args, acc_steps, **kwargs):
        super().__init__(*args, **kwargs)
        self.acc_steps = acc_steps

    def get_loss(self, *args, **kwargs):
        return super().get_loss(*args, **kwargs) / self.acc_steps

    def train_step(self, batch, **fit_params):
        step = self.train_step_single(batch, **fit_params)
        if len(self.history[-1, "batches"]) % self.acc_steps == 0:
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


def train(work: Work, model, tape):
    schedule = LRScheduler(LambdaLR, step_every="batch", lr_lambda=lambda batch: work.factor(batch // work.accumulate))
    net = GradAccNet(
        model, acc_steps=work.accumulate, criterion=work.loss, optimizer=torch.optim.SGD, lr=work.lr,
        optimizer__momentum=work.momentum, max_epochs=work.epochs, batch_size=work.batch_size, train_split=None,
        callbacks=[schedule], verbose=0)
    net.fit(work.train_data, y=None)
