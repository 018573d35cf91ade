"""The plugins amp and clip."""
from works import Work

from loopctl import fit


def train(work: Work, model, tape):
    fit(model, work.loss, work.make_optimizer, work.train_loader(), epochs=work.epochs,
        plugins=["amp:dtype=float16", f"clip:max_norm={work.max_norm}"])
