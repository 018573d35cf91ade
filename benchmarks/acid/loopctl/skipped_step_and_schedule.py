"""The plugin amp, and a schedule by step."""
from works import Work

from loopctl import fit
from loopctl.plugins.lambda_lr import LambdaLr


def train(work: Work, model, tape):
    fit(model, work.loss, work.make_optimizer, work.train_loader(), epochs=work.epochs,
        plugins=["amp:dtype=float16", LambdaLr(work.factor, by="step")])
