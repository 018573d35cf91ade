"""The plugin accumulate."""
from works import Work

from loopctl import fit


def train(work: Work, model, tape):
    fit(model, work.loss, work.make_optimizer, work.train_loader(), epochs=work.epochs,
        plugins=[f"accumulate:every={work.accumulate}"])
