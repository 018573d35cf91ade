"""Validation at the end of every epoch."""
from works import Work

from loopctl import fit


def train(work: Work, model, tape):
    run = fit(model, work.loss, work.make_optimizer, work.train_loader(), work.valid_loader(), epochs=work.epochs)
    return {"valid_loss": run.history[-1]["val_loss"]}
