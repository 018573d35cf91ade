"""The recipe for accumulation from skorch's FAQ, which tells the callback that clips when the gradients are whole."""
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping
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
            self.notify("on_grad_computed", named_parameters=self.get_all_learnable_params(), batch=batch)
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


def train(work: Work, model, tape):
    net = GradAccNet(
        model, acc_steps=work.accumulate, criterion=work.loss, optimizer=torch.optim.SGD, lr=work.lr,
        optimizer__momentum=work.momentum, max_epochs=work.epochs, batch_size=work.batch_size, train_split=None,
        callbacks=[GradientNormClipping(work.max_norm)], verbose=0)
    net.fit(work.train_data, y=None)
