"""`validate` after the training."""
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from works import Work


def train(work: Work, model, tape):
    optimizer = OptimWrapper(opt=work.make_optimizer(model.parameters()))
    data = DataLoaders(work.train_loader(), work.valid_loader(), device="cpu")
    learn = Learner(data, model, work.loss, optimizer, work.lr)
    learn.fit(work.epochs)
    valid_loss, = learn.validate()
    return {"valid_loss": valid_loss}
