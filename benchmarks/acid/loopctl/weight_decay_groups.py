"""The plugin layerwise_lr, which makes the parameter groups."""
from works import Work

from loopctl import fit


def train(work: Work, model, tape):
    fit(model, work.loss, work.make_optimizer, work.train_loader(), epochs=work.epochs,
        plugins=["layerwise_lr:no_decay=norms,biases"])
