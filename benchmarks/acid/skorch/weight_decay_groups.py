"""Parameter groups by the patterns of names that skorch's optimizer__param_groups takes."""
import torch
from skorch import NeuralNetClassifier
from works import Work


def train(work: Work, model, tape):
    net = NeuralNetClassifier(
        model, criterion=work.loss, optimizer=torch.optim.AdamW, lr=work.lr, optimizer__weight_decay=work.weight_decay,
        optimizer__param_groups=[("*.bias", {"weight_decay": 0.0}), ("norm.*", {"weight_decay": 0.0})],
        max_epochs=work.epochs, batch_size=work.batch_size, train_split=None, verbose=0)
    net.fit(work.train_data, y=None)
