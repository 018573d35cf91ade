"""Any optimizer of torch: skorch always passes a closure to its step."""
import torch
from skorch import NeuralNetClassifier
from works import Work


def train(work: Work, model, tape):
    net = NeuralNetClassifier(
        model, criterion=work.loss, optimizer=torch.optim.LBFGS, lr=0.25, optimizer__max_iter=4,
        optimizer__history_size=5, max_epochs=work.epochs, batch_size=work.batch_size, train_split=None, verbose=0)
    net.fit(work.train_data, y=None)
