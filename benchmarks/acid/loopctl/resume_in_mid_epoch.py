"""The plugin checkpoint, and `resume`. A plugin leaves the run after some updates, as max_time does after a time."""
from works import Work

from loopctl import fit, hookimpl
from loopctl.plugins.lambda_lr import LambdaLr


class Leave:
    """Leave the run after some updates, to be resumed."""

    def __init__(self, after: int) -> None:
        self.after = after

    @hookimpl
    def after_step(self, run):
        if run.step == self.after:
            run.leave = "the first part is over"


def train(work: Work, model, tape):
    plugins = ["checkpoint", LambdaLr(work.factor, by="step"), *([Leave(work.stop_after)] if work.part == 1 else [])]
    fit(model, work.loss, work.make_optimizer, work.train_loader(), epochs=work.epochs, plugins=plugins,
        out=work.folder, resume=work.folder if work.part == 2 else None)
