"""The accumulation that skorch's page on Accelerate offers: Accelerator(gradient_accumulation_steps=4)."""
import torch
from accelerate import Accelerator
from skorch import NeuralNetClassifier
from skorch.hf import AccelerateMixin
from works import Work


class AcceleratedNet(AccelerateMixin, NeuralNetClassifier):
    pass


def train(work: Work, model, tape):
    net = AcceleratedNet(
        model, accelerator=Accelerator(gradient_accumulation_steps=work.accumulate, cpu=True), criterion=work.loss,
        optimizer=torch.optim.SGD, lr=work.lr, optimizer__momentum=work.momentum, max_epochs=work.epochs,
        batch_size=work.batch_size, train_split=None, verbose=0)
    net.fit(work.train_data, y=None)
