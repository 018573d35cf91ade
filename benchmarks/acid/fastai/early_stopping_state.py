"""`EarlyStoppingCallback`, with `save` and `load`; the second `fit` has the epochs that are left."""
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from works import Work


def train(work: Work, model, tape):
    optimizer = OptimWrapper(opt=work.make_optimizer(model.parameters()))
    data = DataLoaders(work.train_loader(), work.valid_loader(), device="cpu")
    learn = Learner(data, model, work.loss, optimizer, work.lr, path=work.folder)
    stopper = EarlyStoppingCallback(patience=work.patience)
    if work.part == 1:
        learn.fit(work.stop_after, cbs=stopper)
        learn.save("saved", with_opt=True)
        return {"epochs": learn.epoch + 1}
    learn.load("saved", with_opt=True)
    learn.fit(work.epochs - work.stop_after, cbs=stopper)      # with start_epoch the callback ends in an IndexError
    return {"epochs": work.stop_after + learn.epoch + 1}
