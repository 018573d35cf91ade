"""The plugins early_stopping and checkpoint, and `resume`."""
from works import Work

from loopctl import fit


def train(work: Work, model, tape):
    run = fit(model, work.loss, work.make_optimizer, work.train_loader(), work.valid_loader(),
              epochs=work.stop_after if work.part == 1 else work.epochs,
              plugins=["checkpoint", f"early_stopping:patience={work.patience}"],
              out=work.folder, resume=work.folder if work.part == 2 else None)
    return {"epochs": run.epoch}
