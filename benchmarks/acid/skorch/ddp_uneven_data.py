"""Two processes with Accelerate, as skorch's page on it says."""
import torch
from accelerate import Accelerator
from skorch import NeuralNetClassifier
from skorch.hf import AccelerateMixin
from torch.nn.functional import cross_entropy
from works import Work


class AcceleratedNet(AccelerateMixin, NeuralNetClassifier):
    pass


class Criterion:
    """The loss as a function: a module without parameters would be wrapped in DDP, which refuses it on a CPU."""

    def __call__(self, output, target):
        return cross_entropy(output, target)


def train(work: Work, model, tape):
    net = AcceleratedNet(
        model, accelerator=Accelerator(cpu=True), criterion=Criterion, optimizer=torch.optim.SGD, lr=work.lr,
        optimizer__momentum=work.momentum, max_epochs=work.epochs, batch_size=work.batch_size, train_split=None,
        verbose=0)
    net.fit(work.train_data, y=None)
