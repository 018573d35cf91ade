"""`GradientAccumulation`, which counts samples."""
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from works import Work


def train(work: Work, model, tape):
    optimizer = OptimWrapper(opt=work.make_optimizer(model.parameters()))
    data = DataLoaders(work.train_loader(), work.valid_loader(), device="cpu")
    learn = Learner(data, model, work.loss, optimizer, work.lr,
                    cbs=GradientAccumulation(work.batch_size * work.accumulate))
    learn.fit(work.epochs)
