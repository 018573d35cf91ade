"""An optimizer of torch that needs a closure, in `OptimWrapper`."""
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from works import NotOffered, Work


def train(work: Work, model, tape):
    optimizer = OptimWrapper(opt=work.make_optimizer(model.parameters()))
    data = DataLoaders(work.train_loader(), work.valid_loader(), device="cpu")
    learn = Learner(data, model, work.loss, optimizer, work.lr)
    try:
        learn.fit(work.epochs)
    except TypeError as error:
        raise NotOffered("the step of the optimizer is called without a closure") from error
