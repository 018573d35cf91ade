"""The recipe for accumulation from skorch's FAQ, with the step after the last batch that the FAQ asks for."""
import torch
from skorch import NeuralNetClassifier
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
            self.update()
        return step

    def on_epoch_end(self, net, **kwargs):
        if len(self.history[-1, "batches"]) % self.acc_steps:
            self.update()
        super().on_epoch_end(net, **kwargs)

    def update(self):
        self.optimizer_.step()
        self.optimizer_.zero_grad()


def train(work: Work, model, tape):
    net = GradAccNet(
        model, acc_steps=work.accumulate, criterion=work.loss, optimizer=torch.optim.SGD, lr=work.lr,
        optimizer__momentum=work.momentum, max_epochs=work.epochs, batch_size=work.batch_size, train_split=None,
        verbose=0)
    net.fit(work.train_data, y=None)
