"""float16 as skorch's page on Accelerate says, and its LRScheduler per batch."""
import torch
from accelerate import Accelerator
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler
from skorch.hf import AccelerateMixin
from torch.optim.lr_scheduler import LambdaLR
from works import NeedsGpu, Work


class AcceleratedNet(AccelerateMixin, NeuralNetClassifier):
    pass


def train(work: Work, model, tape):
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    if accelerator.scaler is None:
        raise NeedsGpu('on a CPU, Accelerator(mixed_precision="fp16") trains in float32 without a loss scale, and says '
                       "nothing")
    net = AcceleratedNet(
        model, accelerator=accelerator, criterion=work.loss, optimizer=torch.optim.SGD, lr=work.lr,
        optimizer__momentum=work.momentum, max_epochs=work.epochs, batch_size=work.batch_size, train_split=None,
        callbacks=[LRScheduler(LambdaLR, step_every="batch", lr_lambda=work.factor)], verbose=0)
    net.fit(work.train_data, y=None)
