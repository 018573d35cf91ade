"""The valid_loss that skorch records after every epoch, of a data set given by predefined_split."""
import torch
from skorch import NeuralNetClassifier
from skorch.helper import predefined_split
from works import Work


def train(work: Work, model, tape):
    net = NeuralNetClassifier(
        model, criterion=work.loss, optimizer=torch.optim.SGD, lr=work.lr, optimizer__momentum=work.momentum,
        max_epochs=work.epochs, batch_size=work.batch_size, train_split=predefined_split(work.valid_data),
        verbose=0)
    net.fit(work.train_data, y=None)
    return {"valid_loss": net.history[-1, "valid_loss"]}
