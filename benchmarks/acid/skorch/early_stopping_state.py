"""EarlyStopping, with the checkpoint at the end of training that skorch's page on saving loads to continue from."""
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import EarlyStopping, LoadInitState, TrainEndCheckpoint
from skorch.helper import predefined_split
from works import Work


def train(work: Work, model, tape):
    checkpoint = TrainEndCheckpoint(dirname=str(work.folder))
    net = NeuralNetClassifier(
        model, criterion=work.loss, optimizer=torch.optim.SGD, lr=work.lr, optimizer__momentum=work.momentum,
        max_epochs=work.stop_after if work.part == 1 else work.epochs - work.stop_after, batch_size=work.batch_size,
        train_split=predefined_split(work.valid_data), verbose=0,
        callbacks=[EarlyStopping(patience=work.patience, threshold=0), checkpoint, LoadInitState(checkpoint)])
    net.fit(work.train_data, y=None)
    return {"epochs": len(net.history)}
